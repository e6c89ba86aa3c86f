"""Every data set on a fake tree, as its authors or other projects arrange it, and broken ones."""

from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

from fishertune_d2.data.check import check_datasets
from fishertune_d2.data.dataset_table import _ACDC_SEQUENCES, DATASETS, _streets_root
from fishertune_d2.data.image_files import DatasetError, read_label
from fishertune_d2.data.load_pairs import load_pairs

BY_NAME = {dataset.name: dataset for dataset in DATASETS}
ROAD = {
    "train_ids": 0,
    "label_ids": 7,
    "synthia": 3,
    "camvid": 3,
    "mapillary_v1.2_rein": 13,
    "mapillary_v1.2_hrda": 13,
}
"""The id of road in the files of each label map."""

# For each data set two pairs of its tree below DETECTRON2_DATASETS, image and label.
TREES: dict[str, list[tuple[str, str]]] = {
    "gtav_train": [(f"gta/images/0000{k}.png", f"gta/labels/0000{k}.png") for k in "12"],
    "synthia_train": [
        (f"synthia/RGB/000000{k}.png", f"synthia/GT/LABELS/000000{k}.png") for k in "01"
    ],
    "foggy_zurich": [
        (f"Foggy_Zurich/RGB/{name}", f"Foggy_Zurich/gt_labelTrainIds/{name}")
        for name in ("GP010229/1508040913.0_frame_000955.png", "GOPR0119/1.0_frame_000001.png")
    ],
    "foggy_driving": [
        (
            "Foggy_Driving/leftImg8bit/test/public/public_1_2_leftImg8bit.png",
            "Foggy_Driving/gtFine/test/public/public_1_2_gtFine_labelIds.png",
        ),
        (
            "Foggy_Driving/leftImg8bit/test_extra/web/web_3_4_leftImg8bit.png",
            "Foggy_Driving/gtCoarse/test_extra/web/web_3_4_gtCoarse_labelIds.png",
        ),
    ],
    "dark_zurich_val": [
        (
            f"dark_zurich/rgb_anon/val/night/GOPR0356/GOPR0356_frame_{k}_rgb_anon.png",
            f"dark_zurich/gt/val/night/GOPR0356/GOPR0356_frame_{k}_gt_labelTrainIds.png",
        )
        for k in ("000321", "000324")
    ],
    "nighttime_driving": [
        (
            f"NighttimeDrivingTest/leftImg8bit/test/night/0_frame_{k}_leftImg8bit.png",
            "NighttimeDrivingTest/gtCoarse_daytime_trainvaltest/test/night/"
            f"0_frame_{k}_gtCoarse_labelTrainIds.png",
        )
        for k in ("0001", "0205")
    ],
}
for _split in ("train", "val"):
    TREES[f"cityscapes_{_split}"] = [
        (
            f"cityscapes/leftImg8bit/{_split}/{city}/{city}_0_0_leftImg8bit.png",
            f"cityscapes/gtFine/{_split}/{city}/{city}_0_0_gtFine_labelIds.png",
        )
        for city in ("bonn", "ulm")
    ]
    TREES[f"bdd100k_{_split}"] = [
        (
            f"bdd100k/images/10k/{_split}/{k}-a.jpg",
            f"bdd100k/labels/sem_seg/masks/{_split}/{k}-a.png",
        )
        for k in "01"
    ]
    _folder = {"train": "training", "val": "validation"}[_split]
    for _map in ("", "_hrda"):
        TREES[f"mapillary_{_split}{_map}"] = [
            (f"mapillary/{_folder}/images/{k}_-Q.jpg", f"mapillary/{_folder}/labels/{k}_-Q.png")
            for k in "ab"
        ]
    # One sequence of both splits and one of this split alone; of the latter fog's val has none.
    for _condition, _sequences in {
        "fog": ("GOPR0476", "GOPR0480" if _split == "train" else "GP010476"),
        "night": ("GOPR0351", "GP020397" if _split == "train" else "GOPR0356"),
        "rain": ("GOPR0402", "GP020571" if _split == "train" else "GOPR0572"),
        "snow": ("GOPR0122", "GP050176" if _split == "train" else "GOPR0605"),
    }.items():
        TREES[f"acdc_{_condition}_{_split}"] = [
            (
                f"acdc/rgb_anon/{_condition}/{_split}/{s}/{s}_frame_000001_rgb_anon.png",
                f"acdc/gt/{_condition}/{_split}/{s}/{s}_frame_000001_gt_labelTrainIds.png",
            )
            for s in _sequences
        ]
    TREES[f"acdc_{_split}"] = [
        pair for name in ("fog", "night", "rain", "snow") for pair in TREES[f"acdc_{name}_{_split}"]
    ]
for _name, _split, _stem in (
    ("camvid_day_train", "train", "0006R0_f"),
    ("camvid_day_val", "val", "0016E5_"),
    ("camvid_day_test", "test", "Seq05VD_f"),
    ("camvid_dusk_dev", "train", "0001TP_"),
    ("camvid_dusk_test", "test", "0001TP_"),
):
    TREES[_name] = [
        (f"CamVid/{_split}/{_stem}0{k}.jpg", f"CamVid/{_split}annot/{_stem}0{k}.png") for k in "12"
    ]

# Files that lie beside those of the tree and are none of its pairs.
BESIDE = {
    "gtav_train": ["gta/labels/00001_labelTrainIds.png", "gta/split.mat"],
    "synthia_train": ["synthia/GT/COLOR/0000000.png", "synthia/RGB/._0000000.png"],
    "cityscapes_val": [
        f"cityscapes/gtFine/val/bonn/bonn_0_0_gtFine_{kind}"
        for kind in ("color.png", "instanceIds.png", "labelTrainIds.png", "polygons.json")
    ],
    "bdd100k_val": [
        "bdd100k/labels/sem_seg/colormaps/val/0-a.png",
        "bdd100k/images/10k/test/9.jpg",
    ],
    "mapillary_val": ["mapillary/validation/instances/a_-Q.png", "mapillary/testing/images/c.jpg"],
    "acdc_val": [
        "acdc/rgb_anon/fog/val_ref/GOPR0476/GOPR0476_frame_000001_rgb_ref_anon.png",
        "acdc/rgb_anon/fog/test/GOPR0477/GOPR0477_frame_000001_rgb_anon.png",
        "acdc/gt/fog/val/GOPR0476/GOPR0476_frame_000001_gt_labelIds.png",
        "acdc/gt/fog/val/GOPR0476/GOPR0476_frame_000001_gt_invIds.png",
    ],
    "foggy_zurich": [
        "Foggy_Zurich/RGB/GOPR0119/2.0_frame_000002.png",
        "Foggy_Zurich/gt_color/GOPR0119/1.0_frame_000001.png",
    ],
    "foggy_driving": ["Foggy_Driving/gtFine/test/public/public_1_2_gtFine_color.png"],
    "dark_zurich_val": ["dark_zurich/rgb_anon/val_ref/day/GOPR0356_ref/x_ref_rgb_anon.png"],
    "nighttime_driving": [
        "NighttimeDrivingTest/gtCoarse_daytime_trainvaltest/test/night/0_frame_0001_gtCoarse_color.png"
    ],
}


@pytest.fixture
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path


def write(root: Path, name: str, pairs=None) -> list[tuple[str, str]]:
    """Writes a data set's pairs, all road, and its list of images; returns their full paths."""
    pairs = TREES[name] if pairs is None else pairs
    dataset = BY_NAME[name]
    full = [(root / image, root / label) for image, label in pairs]
    for image, label in full:
        image.parent.mkdir(parents=True, exist_ok=True)
        label.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4)).save(image)
        write_label(label, dataset.label_map, ROAD[dataset.label_map])
    if dataset.image_list:
        (root / dataset.image_list).parent.mkdir(parents=True, exist_ok=True)
        lines = [str(Path(image).relative_to(Path(dataset.image_dir).parent)) for image, _ in pairs]
        (root / dataset.image_list).write_text("\n".join(lines) + "\n")
    return sorted((str(image), str(label)) for image, label in full)


def write_label(path: Path, label_map: str, value: int) -> None:
    if label_map == "synthia":
        pixels = np.zeros((4, 6, 3), dtype=np.uint16)
        pixels[:, :, 2] = value
        cv2.imwrite(str(path), pixels)
    elif label_map.startswith("mapillary") or "gta/" in str(path):
        image = Image.new("P", (6, 4), value)
        image.putpalette([90, 90, 90] * 256)  # the colours say nothing
        image.save(path)
    else:
        Image.fromarray(np.full((4, 6), value, dtype=np.uint8)).save(path)


def loaded(name: str) -> list[tuple[str, str]]:
    return sorted((d["file_name"], d["sem_seg_file_name"]) for d in load_pairs(BY_NAME[name]))


def test_every_data_set_has_its_fake_tree():
    names = {name for name, dataset in BY_NAME.items() if dataset.root is not _streets_root}
    assert names == set(TREES)


@pytest.mark.parametrize("name", TREES)
def test_trees_as_their_authors_ship_them(root, name):
    written = write(root, name)
    for path in BESIDE.get(name, []):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"")
    assert loaded(name) == written
    for item in load_pairs(BY_NAME[name]):
        assert (item["dataset_name"], item["test_size"]) == (name, BY_NAME[name].test_size)
        assert (item["height"], item["width"]) == (4, 6)
        assert (read_label(item["sem_seg_file_name"], item["label_map"]) == 0).all()
    assert len({item["image_id"] for item in load_pairs(BY_NAME[name])}) == len(written)
    check_datasets([name], num_classes=19)


@pytest.mark.parametrize("name", TREES)
@pytest.mark.parametrize("missing", ["image", "label"])
def test_a_missing_half_of_a_pair_is_an_error_in_every_tree(root, name, missing):
    pair = write(root, name)[0]
    Path(pair[missing == "label"]).unlink()
    with pytest.raises(DatasetError, match=rf"^{name}: .*(have no {missing}|not there)"):
        load_pairs(BY_NAME[name])


@pytest.mark.parametrize("name", TREES)
def test_an_id_outside_the_map_is_an_error_in_every_tree(root, name):
    pair = write(root, name)[0]
    write_label(Path(pair[1]), BY_NAME[name].label_map, 200)
    with pytest.raises(
        DatasetError, match=f"label 200 is out of range .*{BY_NAME[name].label_map}"
    ):
        check_datasets([name])


@pytest.mark.parametrize("name", TREES)
def test_unequal_sizes_are_an_error_in_every_tree_but_gtavs(root, name, caplog):
    image = write(root, name)[0][0]
    Image.new("RGB", (6, 5)).save(image)
    if name == "gtav_train":
        assert len(load_pairs(BY_NAME[name])) == 1
        assert "gtav_train: dropped 1 pairs of unequal size" in caplog.text
    else:
        with pytest.raises(DatasetError, match=f"^{name}: .* has 6x5 pixels and .* 6x4"):
            load_pairs(BY_NAME[name])


def test_a_number_of_pairs_that_is_not_the_published_is_said(root, caplog):
    write(root, "dark_zurich_val")
    load_pairs(BY_NAME["dark_zurich_val"])
    assert "dark_zurich_val: 2 pairs, 50 are published" in caplog.text


# ACDC as other projects arrange it.


def without(folders: tuple[str, ...], name: str) -> list[tuple[str, str]]:
    """The tree of a data set without some of its folders."""

    def flatten(path: str) -> str:
        return "/".join(part for part in path.split("/") if part not in folders)

    return [(flatten(image), flatten(label)) for image, label in TREES[name]]


CONDITIONS = ("fog", "night", "rain", "snow")
SEQUENCES = tuple(
    label.split("/")[-2] for split in ("train", "val") for _, label in TREES[f"acdc_{split}"]
)


@pytest.mark.parametrize("split", ["train", "val"])
def test_acdc_without_folders_of_sequences(root, split):
    for condition in CONDITIONS:
        name = f"acdc_{condition}_{split}"
        assert write(root, name, without(SEQUENCES, name)) == loaded(name)
    assert len(loaded(f"acdc_{split}")) == 8


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("folders", [CONDITIONS, CONDITIONS + SEQUENCES])
def test_acdc_without_folders_of_conditions(root, split, folders):
    name = f"acdc_{split}"
    assert write(root, name, without(folders, name)) == loaded(name)
    for condition in CONDITIONS:
        name = f"acdc_{condition}_{split}"
        pairs = without(folders, name)
        assert loaded(name) == sorted(
            (f"{root}/{image}", f"{root}/{label}") for image, label in pairs
        )


def test_no_sequence_of_acdc_shows_two_conditions():
    sequences = [sequence for of_one in _ACDC_SEQUENCES.values() for sequence in of_one]
    assert len(set(sequences)) == len(sequences) == 40


def test_acdc_copied_into_flat_folders_is_read_once(root):
    flat = without(CONDITIONS + SEQUENCES, "acdc_val")
    nested = write(root, "acdc_val")
    write(root, "acdc_val", flat)
    assert loaded("acdc_val") == nested


def test_acdcs_labels_of_one_arrangement_do_not_serve_images_of_another(root):
    nested, flat = TREES["acdc_val"], without(CONDITIONS + SEQUENCES, "acdc_val")
    write(root, "acdc_val", [(a, b) for (a, _), (_, b) in zip(nested, flat, strict=True)])
    with pytest.raises(DatasetError, match=r"no folder .*acdc/gt/\*/val. It needs") as error:
        loaded("acdc_val")
    assert f"or\n  {root}/acdc/rgb_anon/val/**/*_rgb_anon.png" in str(error.value)


# Mapillary's versions.


def test_the_archive_of_version_2_holds_the_labels_of_1_2(root):
    pairs = [
        (a, b.replace("labels", "v1.2/labels").replace("//", "/"))
        for a, b in TREES["mapillary_val"]
    ]
    written = write(root, "mapillary_val", pairs)
    (root / "mapillary/validation/v2.0/labels").mkdir(parents=True)
    assert loaded("mapillary_val") == loaded("mapillary_val_hrda") == written


@pytest.mark.parametrize("name", ["mapillary_val", "mapillary_val_hrda"])
def test_labels_of_version_2_are_refused(root, name):
    label = Path(write(root, name)[1][1])
    write_label(label, BY_NAME[name].label_map, 123)
    with pytest.raises(DatasetError, match=r"label 123 is out of range.*mapillary_v1\.2.* 0-65\."):
        check_datasets([name])


def test_mapillary_is_scored_on_halved_labels(root):
    write(root, "mapillary_val")
    assert all(item["halve_label"] for item in load_pairs(BY_NAME["mapillary_val"]))
    assert {dataset.name for dataset in DATASETS if dataset.halve_labels} == {
        f"mapillary_{split}" for split in ("train", "train_hrda", "val", "val_hrda")
    }


# Foggy Zurich's list.


def test_only_listed_images_are_used(root):
    written = write(root, "foggy_zurich")
    path = root / BY_NAME["foggy_zurich"].image_list
    first = path.read_text().splitlines()[0]
    path.write_text(f"\n{first}  \r\n\n")  # blanks and Windows' ends of lines
    assert loaded("foggy_zurich") == [written[1]]


@pytest.mark.parametrize("line", ["RGB/GP010229/absent.png", "other/GOPR0119/1.png", "RGB/"])
def test_a_list_that_names_a_missing_file_is_an_error(root, line):
    write(root, "foggy_zurich")
    path = root / BY_NAME["foggy_zurich"].image_list
    path.write_text(path.read_text() + line)
    message = f"testv2_filenames.txt names 1 of 3 images that are not there: {line}"
    with pytest.raises(DatasetError, match=message):
        loaded("foggy_zurich")


def test_a_missing_or_empty_list_is_an_error(root):
    write(root, "foggy_zurich")
    path = root / BY_NAME["foggy_zurich"].image_list
    path.write_text("")
    with pytest.raises(DatasetError, match="no image found.*") as error:
        loaded("foggy_zurich")
    assert f"{path}    (the images to use)" in str(error.value)
    path.unlink()
    with pytest.raises(DatasetError, match=f"cannot read {path} .FileNotFoundError"):
        loaded("foggy_zurich")
