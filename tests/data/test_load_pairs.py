import os
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fishertune_d2.data.dataset_description import SemSegDataset
from fishertune_d2.data.dataset_dicts import load_datasets
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.load_pairs import load_pairs

BY_NAME = {dataset.name: dataset for dataset in DATASETS}


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_pairs_are_sorted_filtered_and_complete(camvid_tree, suffix):
    folder = camvid_tree(image_suffix=suffix)
    day, dusk = load_pairs(BY_NAME["camvid_day_train"]), load_pairs(BY_NAME["camvid_dusk_dev"])
    assert [item["image_id"] for item in day] == ["a", "b"]
    assert [item["image_id"] for item in dusk] == ["0001TP_c"]
    assert day[0] == {
        "file_name": str(folder / f"train/a{suffix}"),
        "sem_seg_file_name": str(folder / "trainannot/a.png"),
        "height": 12,
        "width": 16,
        "image_id": "a",
        "dataset_name": "camvid_day_train",
        "label_map": "camvid",
        "test_size": None,
        "halve_label": False,
    }


def test_a_missing_folder_shows_the_expected_tree(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    with pytest.raises(DatasetError) as error:
        load_pairs(BY_NAME["gtav_train"])
    text = str(error.value)
    assert f"{tmp_path}/nowhere/gta/images/**/*.png" in text
    assert f"{tmp_path}/nowhere/gta/labels/**/*.png" in text
    assert "set DETECTRON2_DATASETS" in text


@pytest.mark.parametrize("name", [n for n in BY_NAME if not n.startswith("streets")])
def test_every_data_set_says_what_it_needs(name, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(DatasetError, match=f"^{name}: no folder.*"):
        load_datasets([name])


def test_a_home_folder_is_expanded(camvid_tree, tmp_path, monkeypatch):
    camvid_tree()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DETECTRON2_DATASETS", "~")
    assert len(load_datasets(["camvid_day_train"])) == 2


def test_an_empty_folder_is_an_error(camvid_tree):
    folder = camvid_tree()
    for image in (folder / "train").iterdir():
        image.unlink()
    with pytest.raises(DatasetError, match="no image found"):
        load_pairs(BY_NAME["camvid_day_train"])


@pytest.mark.parametrize(
    ("removed", "message"),
    [
        ("trainannot/b.png", r"1 of 2 images have no label. Missing: .*trainannot/b\.png"),
        ("train/b.jpg", r"1 of 2 labels have no image. Missing: .*train/b\.png \(or .*\.jpg"),
    ],
)
def test_a_missing_half_of_a_pair_is_named(camvid_tree, removed, message):
    (camvid_tree() / removed).unlink()
    with pytest.raises(DatasetError, match=message):
        load_pairs(BY_NAME["camvid_day_train"])
    assert len(load_pairs(BY_NAME["camvid_dusk_dev"])) == 1  # another data set of the same folder


def test_a_long_list_of_missing_files_is_cut(camvid_tree):
    folder = camvid_tree(tuple(f"x{k}" for k in range(9)))
    for label in (folder / "trainannot").iterdir():
        label.unlink()
    with pytest.raises(DatasetError, match=r"9 of 9 .*x4\.png and 4 more"):
        load_pairs(BY_NAME["camvid_day_train"])


def test_the_same_image_twice_is_an_error(camvid_tree):
    folder = camvid_tree()
    Image.open(folder / "train/a.jpg").save(folder / "train/a.png")
    with pytest.raises(DatasetError, match=r"a\.jpg and .*a\.png are the same image twice"):
        load_pairs(BY_NAME["camvid_day_train"])


def test_unequal_sizes_are_an_error_or_dropped(camvid_tree, tmp_path, caplog):
    folder = camvid_tree()
    Image.new("RGB", (9, 9)).save(folder / "train/a.jpg")
    with pytest.raises(DatasetError, match=r"a\.jpg has 9x9 pixels and .*a\.png 16x12"):
        load_pairs(BY_NAME["camvid_day_train"])

    os.rename(folder, tmp_path / "gta")
    os.rename(tmp_path / "gta/train", tmp_path / "gta/images")
    os.rename(tmp_path / "gta/trainannot", tmp_path / "gta/labels")
    pairs = load_pairs(BY_NAME["gtav_train"])
    assert [item["image_id"] for item in pairs] == ["0001TP_c", "b"]
    assert "dropped 1 pairs of unequal size" in caplog.text


def test_an_unreadable_header_is_named(camvid_tree):
    (camvid_tree() / "train/a.jpg").write_bytes(b"")
    with pytest.raises(DatasetError, match=r"a\.jpg: cannot be read"):
        load_pairs(BY_NAME["camvid_day_train"])


def test_nested_folders_pair_by_path_and_suffix(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    ids = Image.fromarray(np.full((4, 6), 7, dtype=np.uint8))
    for city, place in (("bonn", "bonn_1"), ("ulm", "ulm_1")):
        images = tmp_path / "cityscapes/leftImg8bit/val" / city
        labels = tmp_path / "cityscapes/gtFine/val" / city
        images.mkdir(parents=True)
        labels.mkdir(parents=True)
        Image.new("RGB", (6, 4)).save(images / f"{place}_leftImg8bit.png")
        for kind in ("labelIds", "labelTrainIds", "color", "instanceIds"):
            ids.save(labels / f"{place}_gtFine_{kind}.png")
    pairs = load_pairs(BY_NAME["cityscapes_val"])
    assert [item["image_id"] for item in pairs] == ["bonn/bonn_1", "ulm/ulm_1"]
    assert pairs[1]["sem_seg_file_name"].endswith("ulm/ulm_1_gtFine_labelIds.png")
    assert pairs[0]["test_size"] == (1024, 512)


def write_grey(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (2, 1)).save(path)


STEMS = st.lists(st.text("ab_", min_size=1, max_size=3), min_size=1, max_size=3).map("/".join)


@settings(deadline=None, max_examples=50)
@given(images=st.sets(STEMS, min_size=1, max_size=5), labels=st.sets(STEMS, max_size=5))
def test_any_tree_gives_all_its_pairs_or_an_error(images, labels):
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        dataset = SemSegDataset(
            name="x",
            image_dir="i",
            label_dir="l",
            label_map="train_ids",
            domain="x",
            root=lambda: root,
        )
        for part, stems in (("i", images), ("l", labels | images)):
            for stem in stems:
                write_grey(root / part / f"{stem}.png")
        if labels <= images:
            assert [item["image_id"] for item in load_pairs(dataset)] == sorted(images)
        else:
            extra, total = len(labels - images), len(labels | images)
            with pytest.raises(DatasetError, match=f"{extra} of {total} labels have no image"):
                load_pairs(dataset)


def test_linked_folders_are_followed(camvid_tree, tmp_path):
    folder = camvid_tree(("x/a", "x/b"))
    for part in ("train", "trainannot"):
        os.rename(folder / part / "x", tmp_path / f"{part}_elsewhere")
        (folder / part / "x").symlink_to(tmp_path / f"{part}_elsewhere")
    pairs = load_pairs(BY_NAME["camvid_day_train"])
    assert [item["image_id"] for item in pairs] == ["x/a", "x/b"]


@pytest.mark.parametrize("part", ["train", "*in"])
def test_brackets_in_paths_are_no_pattern(camvid_tree, tmp_path, monkeypatch, part):
    os.renames(camvid_tree(), tmp_path / "[a]/CamVid")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "[a]"))
    dataset = replace(BY_NAME["camvid_day_train"], image_dir=f"CamVid/{part}")
    assert len(load_pairs(dataset)) == 2


def test_folders_that_fit_a_pattern_are_read_as_one(tmp_path):
    dataset = SemSegDataset(
        name="x",
        image_dir="x/*/i",
        label_dir="x/*/l",
        label_map="train_ids",
        domain="x",
        root=lambda: tmp_path,
    )
    for path in ("one/i/a", "one/l/a", "two/i/d/b", "two/l/d/b"):
        write_grey(tmp_path / f"x/{path}.png")
    assert [item["image_id"] for item in load_pairs(dataset)] == ["a", "d/b"]
    write_grey(tmp_path / "x/two/i/c.png")
    with pytest.raises(
        DatasetError, match=r"1 of 3 images have no label. Missing: .*/x/\*/l/c.png"
    ):
        load_pairs(dataset)
    (tmp_path / "x/two/i/c.png").rename(tmp_path / "x/two/i/a.png")
    with pytest.raises(
        DatasetError, match=r"one/i/a.png and .*two/i/a.png are the same image twice"
    ):
        load_pairs(dataset)


def test_converted_labels_and_mac_notes_beside_the_originals_are_no_orphans(camvid_tree):
    folder = camvid_tree()
    (folder / "trainannot/a_labelTrainIds.png").write_bytes(b"")
    (folder / "trainannot/._a.png").write_bytes(b"")
    (folder / "train/._a.jpg").write_bytes(b"")
    assert len(load_pairs(BY_NAME["camvid_day_train"])) == 2


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("camvid_day_train", 305),
        ("camvid_dusk_dev", 62),
        ("camvid_day_val", 101),
        ("camvid_day_test", 171),
        ("camvid_dusk_test", 62),
    ],
)
def test_real_camvid_has_the_known_counts(shared_dir, monkeypatch, name, count):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared_dir / "datasets"))
    pairs = load_datasets([name])
    assert len(pairs) == count
    assert {(item["height"], item["width"]) for item in pairs} == {(360, 480)}
