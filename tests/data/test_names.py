"""How files' names may end, what is said when none fits, and links between folders."""

import re
from dataclasses import replace

import pytest
from PIL import Image

from fishertune_d2.data.dataset_description import SemSegDataset
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.load_pairs import load_pairs


def write(*paths):
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (2, 1)).save(path, "TIFF" if path.suffix == ".tif" else None)


@pytest.fixture
def dataset(tmp_path):
    return SemSegDataset(
        name="x",
        image_dir="i",
        label_dir="l",
        label_map="train_ids",
        domain="x",
        root=lambda: tmp_path,
    )


def ids(dataset):
    return [item["image_id"] for item in load_pairs(dataset)]


def test_endings_fit_in_any_case(tmp_path, dataset):
    write(tmp_path / "i/a.JPG", tmp_path / "i/b.PNG", tmp_path / "i/c.Jpeg", tmp_path / "i/d.jpg")
    write(tmp_path / "l/a.PNG", tmp_path / "l/b.png", tmp_path / "l/c.Png", tmp_path / "l/d.PNG")
    assert ids(dataset) == ["a", "b", "c", "d"]
    own = replace(dataset, image_suffixes=("_RGB.JPG",), label_suffixes=("_Mask.png",))
    write(tmp_path / "i/e_rgb.jpg", tmp_path / "l/e_mask.PNG")
    assert ids(own) == ["e"]


def test_one_image_in_two_cases_is_twice_the_same(tmp_path, dataset):
    write(tmp_path / "i/a.JPG", tmp_path / "i/a.jpg", tmp_path / "l/a.png")
    with pytest.raises(DatasetError, match=r"a\.JPG and .*a\.jpg are the same image twice"):
        load_pairs(dataset)


def test_a_list_of_images_may_name_them_in_another_case(tmp_path, dataset):
    write(tmp_path / "i/a.JPG", tmp_path / "i/b.JPG", tmp_path / "l/a.png", tmp_path / "l/b.png")
    (tmp_path / "list.txt").write_text("i/b.jpg\n")
    assert ids(replace(dataset, image_list="list.txt")) == ["b"]


@pytest.mark.parametrize(
    "given", ["png", ".png", "PNG", "*.png", ["png"], (".png",), ["jpg", "png"]]
)
def test_a_suffix_without_its_dot_or_alone_is_understood(tmp_path, dataset, given):
    write(tmp_path / "i/a.png", tmp_path / "l/a.png")
    assert ids(replace(dataset, image_suffixes=given, label_suffixes=given)) == ["a"]


@pytest.mark.parametrize("key", ["image_suffixes", "label_suffixes"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("_mask", "holds '_mask', which is not how the names of files end: give whole"),
        (tuple(".png"), "holds '.', which is not how"),
        ([["_a.png"]], r"holds \['_a.png'\], which is not"),
        ("", "holds '', which is not"),
        (".", "holds '.', which is not"),
        ((), "is empty: give the endings"),
        ([None], "holds None, which is not"),
        (None, "holds None, which is not"),
        ("a*.png", r"holds 'a\*\.png', which is not"),
        ("/.png", "holds '/.png', which is not"),
    ],
)
def test_what_cannot_be_an_ending_is_refused(dataset, key, given, message):
    with pytest.raises(DatasetError, match=f"x: {key} {message}"):
        replace(dataset, **{key: given})


def test_images_and_labels_may_share_a_folder(tmp_path, dataset):
    write(tmp_path / "i/a.png", tmp_path / "i/a_mask.png", tmp_path / "i/s/b.png")
    write(tmp_path / "i/s/b_Mask.PNG")
    assert ids(replace(dataset, label_dir="i", label_suffixes="_mask.png")) == ["a", "s/b"]
    write(tmp_path / "j/a_rgb.png", tmp_path / "j/a.png")
    assert ids(replace(dataset, image_dir="j", label_dir="j", image_suffixes="_rgb.png")) == ["a"]


def test_in_a_folder_of_their_own_images_may_end_as_labels_do(tmp_path, dataset):
    write(tmp_path / "i/a_mask.png", tmp_path / "l/a_mask_mask.png")
    assert ids(replace(dataset, label_suffixes="_mask.png")) == ["a_mask"]


def test_hidden_folders_are_passed_over(tmp_path, dataset):
    write(tmp_path / "i/a.png", tmp_path / "l/a.png", tmp_path / "i/.ipynb_checkpoints/a-1.png")
    write(tmp_path / "l/s/.thumbs/b.png")
    assert ids(dataset) == ["a"]
    hidden = tmp_path / ".data"
    write(hidden / "i/a.png", hidden / "l/a.png")  # the folder itself may be hidden
    assert ids(replace(dataset, root=lambda: hidden)) == ["a"]


def test_where_no_image_is_found_the_error_lists_what_is_there(tmp_path, dataset):
    write(*(tmp_path / f"i/s/{k}.tif" for k in range(12)), tmp_path / "l/0.png")
    for name in ("notes.txt", "i.txt", "README"):
        (tmp_path / "i" / name).write_text("")
    with pytest.raises(DatasetError, match=r"x: no image found\. Files of other names") as error:
        load_pairs(dataset)
    assert "there: 12 .tif (0.tif), 2 .txt (i.txt), 1 without an ending (README). It" in str(
        error.value
    )


def test_an_empty_folder_is_not_said_to_hold_files(tmp_path, dataset):
    (tmp_path / "i").mkdir()
    (tmp_path / "l").mkdir()
    with pytest.raises(DatasetError, match=r"no image found\. It needs"):
        load_pairs(dataset)


@pytest.mark.parametrize(("kind", "there"), [("label", "i"), ("image", "l")])
def test_a_missing_half_is_compared_with_what_is_there(tmp_path, dataset, kind, there):
    """The endings of labels are most often misnamed: "_mask.png" where ".png" was registered."""
    other = "l" if there == "i" else "i"
    write(tmp_path / "i/a.png", tmp_path / "l/a.png", tmp_path / f"{there}/b.png")
    write(tmp_path / f"{other}/b.bmp")
    message = rf"no {kind}\. .*/{other}/b\.png.* Files of other names are there: 1 \.bmp \(b\.bmp\)"
    with pytest.raises(DatasetError, match=message):
        load_pairs(dataset)


@pytest.mark.parametrize("target", ["i/s", "i", "."])
def test_a_link_that_leads_back_is_not_followed(tmp_path, dataset, target):
    write(tmp_path / "i/s/a.png", tmp_path / "l/s/a.png")
    (tmp_path / "i/s/back").symlink_to(tmp_path / target, target_is_directory=True)
    assert ids(dataset) == ["s/a"]


def test_links_that_lead_to_each_other_end(tmp_path, dataset):
    for part in "il":
        write(tmp_path / f"{part}/s/a.png", tmp_path / f"{part}/t/b.png")
        (tmp_path / f"{part}/s/other").symlink_to(tmp_path / f"{part}/t")
        (tmp_path / f"{part}/t/other").symlink_to(tmp_path / f"{part}/s")
    assert ids(dataset) == ["s/a", "s/other/b", "t/b", "t/other/a"]


def test_a_link_to_a_folder_outside_is_followed_from_each_place(tmp_path, dataset):
    for part in "il":
        write(tmp_path / f"elsewhere/{part}/a.png")
        (tmp_path / part).mkdir()
        for name in ("one", "two"):
            (tmp_path / part / name).symlink_to(tmp_path / "elsewhere" / part)
    assert ids(dataset) == ["one/a", "two/a"]


def test_the_folder_itself_may_be_a_link(tmp_path, dataset):
    for part in "il":
        write(tmp_path / f"elsewhere/{part}/a.png")
        (tmp_path / part).symlink_to(tmp_path / "elsewhere" / part)
    assert ids(dataset) == ["a"]


def test_a_folder_that_may_not_be_read_is_named(tmp_path, dataset, monkeypatch):
    """os.walk leaves it out without a word."""
    write(tmp_path / "i/s/a.png", tmp_path / "l/s/a.png")
    real = __import__("os").scandir

    def scandir(path):
        if str(path).endswith("i/s"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr("os.scandir", scandir)
    with pytest.raises(DatasetError, match=re.escape(f"{tmp_path}/i/s: cannot be read")):
        load_pairs(dataset)
