from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fishertune_d2.data.dataset_description import SemSegDataset
from fishertune_d2.data.dataset_dicts import load_datasets
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import DatasetError, read_label
from fishertune_d2.data.labels import LABEL_MAPS
from fishertune_d2.data.registration import register, register_sem_seg


@pytest.fixture
def own_data(tmp_path):
    """A person's own data: names of classes, a folder of images, a folder of labels."""
    for folder in ("photos/north", "masks/north"):
        (tmp_path / folder).mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "photos/north/1.jpg")
    label = np.array([[0, 1, 2, 255, 0, 0]] * 4, dtype=np.uint8)
    Image.fromarray(label).save(tmp_path / "masks/north/1_mask.png")
    return tmp_path


@pytest.fixture(autouse=True)
def forget_own_data():
    yield
    for name in [n for n in DatasetCatalog.list() if n.startswith("own_")]:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def register_own(folder: Path, **kwargs):
    register_sem_seg(
        "own_park",
        folder / "photos",
        folder / "masks",
        ["path", "grass", "bench"],
        label_suffix="_mask.png",
        **kwargs,
    )


def test_importing_needs_no_data_and_works_twice(fresh_process):
    assert fresh_process.stdout.startswith("all registered: True\n"), fresh_process.stderr


def test_the_table_is_sound():
    names = [dataset.name for dataset in DATASETS]
    assert len(set(names)) == len(names)
    for dataset in DATASETS:
        assert dataset.label_map in LABEL_MAPS, dataset.name
        assert len(dataset.label_space.collapse) == len(dataset.classes), dataset.name
        assert MetadataCatalog.get(dataset.name).domain == dataset.domain


def test_registering_again_replaces(own_data):
    register_own(own_data)
    register_own(own_data, domain="parks")
    assert MetadataCatalog.get("own_park").domain == "parks"


def test_a_name_of_another_package_is_not_taken_over(own_data):
    with pytest.raises(DatasetError, match="'coco_2017_val' is taken"):
        register_sem_seg("coco_2017_val", own_data, own_data, ["a"])


def test_own_data_in_one_call(own_data):
    register_own(own_data)
    (item,) = load_datasets(["own_park"])
    assert item["image_id"] == "north/1"
    assert (item["height"], item["width"]) == (4, 6)
    metadata = MetadataCatalog.get("own_park")
    assert metadata.stuff_classes == ["path", "grass", "bench"]
    assert metadata.domain == "own_park" and metadata.ignore_label == 255
    assert metadata.label_space.collapse == (0, 1, 2)
    assert len(set(metadata.label_space.colors)) == 3
    assert LABEL_MAPS[item["label_map"]][[0, 2, 3, 255]].tolist() == [0, 2, -1, 255]


def test_own_data_with_impossible_classes_or_colors(own_data):
    with pytest.raises(DatasetError, match="0 classes given"):
        register_sem_seg("own_x", own_data, own_data, [])
    with pytest.raises(DatasetError, match="1 colors given for 3 classes"):
        register_own(own_data, colors=[(0, 0, 0)])


def test_own_data_may_ignore_another_id(own_data):
    register_own(own_data, ignore_label=0)
    (item,) = load_datasets(["own_park"])
    label = read_label(item["sem_seg_file_name"], item["label_map"])
    assert label[0].tolist() == [255, 1, 2, 255, 255, 255]
    assert MetadataCatalog.get("own_park").ignore_label == 0  # for Detectron2's own tools
    register_own(own_data, ignore_label=9)
    (item,) = load_datasets(["own_park"])
    assert read_label(item["sem_seg_file_name"], item["label_map"])[0].tolist()[:4] == [
        0,
        1,
        2,
        255,
    ]


@pytest.mark.parametrize("ignored", [-1, 256, "0", None, True, 0.0])
def test_an_ignored_id_that_no_label_can_hold_is_refused(own_data, ignored):
    with pytest.raises(ValueError, match=f"ignore_label is {ignored!r}: choose the id, 0 to 255"):
        register_own(own_data, ignore_label=ignored)


def test_own_data_that_is_missing_names_the_folder(own_data):
    register_sem_seg("own_x", own_data / "pictures", own_data / "masks", ["a"])
    with pytest.raises(DatasetError, match=f"no folder {own_data}/pictures.*") as error:
        load_datasets(["own_x"])
    assert "DETECTRON2_DATASETS" not in str(error.value)


def test_data_sets_of_different_classes_do_not_mix(own_data, camvid_tree):
    camvid_tree()
    register_own(own_data)
    with pytest.raises(DatasetError, match="camvid_day_train and own_park have different classes"):
        load_datasets(["camvid_day_train", "own_park"])
    assert len(load_datasets(["camvid_day_train", "camvid_dusk_dev"])) == 3


def test_names_are_a_list():
    with pytest.raises(TypeError, match="list of data set names"):
        load_datasets("camvid_day_train")


@pytest.mark.parametrize("writable", [True, False])
def test_built_in_data_go_to_the_data_folder_or_to_the_cache(tmp_path, monkeypatch, writable):
    drawn = []
    monkeypatch.setattr(
        "fishertune_d2.streets.ensure_streets", lambda root: drawn.append(root) or root
    )
    data = tmp_path / "data"
    if not writable:
        data.write_text("a file where a folder should be: nothing can be made below it")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(data))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DatasetError, match="no folder"):
        load_datasets(["streets_fog_val"])
    assert drawn == [(data if writable else tmp_path / "cache") / "streets"]


def test_a_new_entry_of_the_table_is_all_a_data_set_needs(camvid_tree):
    camvid_tree()
    dataset = SemSegDataset(
        name="own_row",
        image_dir="CamVid/train",
        label_dir="CamVid/trainannot",
        label_map="camvid",
        domain="anywhere",
    )
    register(dataset)
    assert len(load_datasets(["own_row"])) == 3
