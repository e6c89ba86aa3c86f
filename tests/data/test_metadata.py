"""Data sets that Detectron2's own functions register: they train and are scored as ours."""

import json
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_sem_seg
from detectron2.data.datasets.coco_panoptic import register_coco_panoptic_separated
from PIL import Image

from fishertune_d2.data import (
    SegmentationMapper,
    build_train_loader,
    check_datasets,
    dataset_metadata,
    load_datasets,
    register_sem_seg,
)
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import DatasetError, read_label
from fishertune_d2.evaluation import DomainGeneralizationEvaluator, summarize

CLASSES = ["sky", "path", "grass"]
IDS = np.array([[0, 1, 1, 2, 255, 255]] * 4, dtype=np.uint8)


@pytest.fixture(autouse=True)
def catalog(tmp_path, monkeypatch):
    """Forgets what a test registers."""
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    before = set(DatasetCatalog.list())
    yield
    for name in set(DatasetCatalog.list()) - before:
        DatasetCatalog.remove(name)
        MetadataCatalog.pop(name, None)


def draw(folder, ids=IDS, image="jpg"):
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for k in range(2):
        Image.new("RGB", ids.shape[::-1]).save(folder / f"images/{k}.{image}")
        Image.fromarray(ids).save(folder / f"labels/{k}.png")
    return str(folder / "images"), str(folder / "labels")


def register_stock(folder, name="stock_park", ids=IDS, change=lambda items: items, **metadata):
    images, labels = draw(folder, ids)
    DatasetCatalog.register(name, lambda: change(load_sem_seg(labels, images)))
    MetadataCatalog.get(name).set(**{"stuff_classes": CLASSES, "ignore_label": 255} | metadata)
    return name


def score_first_class(name):
    """Scores a model that always says class 0."""
    evaluator = DomainGeneralizationEvaluator(name)
    for item in load_datasets([name]):
        scores = torch.zeros(len(dataset_metadata(name).classes), item["height"], item["width"])
        scores[0] = 1
        evaluator.process([item], [{"sem_seg": scores}])
    return evaluator.evaluate()["sem_seg"]


def test_a_stock_data_set_is_read_checked_trained_on_and_scored(tmp_path):
    name = register_stock(tmp_path)
    check_datasets([name], num_classes=3)
    items = load_datasets([name])
    assert [(item["height"], item["width"]) for item in items] == [(4, 6)] * 2
    assert len({item["image_id"] for item in items}) == 2
    loader = build_train_loader(
        items, SegmentationMapper(is_train=True), batch_size=2, num_workers=0, seed=1
    )
    ((one, _),) = islice(loader, 1)
    assert one["sem_seg"].tolist() == IDS.tolist() and one["image"].shape == (3, 4, 6)
    scores = score_first_class(name)
    assert scores == pytest.approx(
        {"mIoU": 25 / 3, "IoU-sky": 25.0, "IoU-path": 0.0, "IoU-grass": 0.0}
    )
    summary = summarize({name: {"sem_seg": scores}}, [name], {}, SegmentationMapper(False))
    assert summary["source"].keys() == {name}
    assert summary["protocol"]["classes"] == {name: CLASSES}


def test_what_a_stock_data_set_does_not_say_has_a_default(tmp_path):
    known = dataset_metadata(register_stock(tmp_path))
    assert known.classes == tuple(CLASSES) and known.label_map == "identity_3"
    assert known.label_space.classes == known.classes
    assert known.label_space.collapse == (0, 1, 2) and known.label_space.colors == known.colors
    assert len(set(known.colors)) == 3
    assert (known.domain, known.test_size, known.halve_labels) == ("stock_park", None, False)


def test_what_a_stock_data_set_says_is_taken(tmp_path):
    colors = [(1, 2, 3), (4, 5, 6), (7, 8, 9)]
    said = {"stuff_colors": colors, "domain": "parks/day", "test_size": (3, 2)}
    name = register_stock(
        tmp_path,
        ignore_label=0,
        change=lambda items: [{**item, "height": 4, "width": 6, "image_id": 7} for item in items],
        **said,
    )
    known = dataset_metadata(name)
    assert (known.domain, known.test_size, known.colors) == ("parks/day", (3, 2), tuple(colors))
    item = load_datasets([name])[0]
    assert item["image_id"] == 7 and item["test_size"] == (3, 2)
    label = read_label(item["sem_seg_file_name"], item["label_map"])
    assert label[0].tolist() == [255, 1, 1, 2, 255, 255]
    assert "IoU-sky" not in score_first_class(name)


def test_every_row_says_the_same_through_the_accessor():
    for dataset in DATASETS:
        known = dataset_metadata(dataset.name)
        for field in ("classes", "label_map", "label_space", "domain", "test_size", "published"):
            assert getattr(known, field) == getattr(dataset, field), (dataset.name, field)
        assert known.halve_labels == dataset.halve_labels


def test_the_semantic_part_of_a_panoptic_data_set_is_used(tmp_path):
    images, labels = draw(tmp_path)
    pictures = [{"id": k, "file_name": f"{k}.jpg", "height": 4, "width": 6} for k in range(2)]
    box = {"bbox": [0, 0, 2, 2], "area": 4, "segmentation": [[0, 0, 2, 0, 2, 2]], "iscrowd": 0}
    things = {
        "images": pictures,
        "categories": [{"id": 5, "name": "dog"}],
        "annotations": [{"id": k + 1, "image_id": k, "category_id": 5, **box} for k in range(2)],
    }
    (tmp_path / "things.json").write_text(json.dumps(things))
    register_coco_panoptic_separated(
        "stock_zoo",
        {"stuff_classes": ["things", "path", "grass"], "thing_classes": ["dog"]},
        images,
        "none",
        "none.json",
        labels,
        str(tmp_path / "things.json"),
    )
    for name in ("stock_zoo_separated", "stock_zoo_stuffonly"):
        check_datasets([name], num_classes=3)
        assert score_first_class(name)["IoU-things"] == pytest.approx(25.0)
    register_stock(tmp_path / "park", stuff_classes=["things", "path", "grass"])
    assert len(load_datasets(["stock_zoo_separated", "stock_park"])) == 4


def test_detectron2s_cityscapes_is_used(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it was registered for ./datasets at import
    root = tmp_path / DatasetCatalog["cityscapes_fine_sem_seg_val"].__defaults__[0]
    labels = tmp_path / DatasetCatalog["cityscapes_fine_sem_seg_val"].__defaults__[1]
    for folder in (root / "bonn", labels / "bonn"):
        folder.mkdir(parents=True)
    stem = "bonn/bonn_000000_000019"
    Image.new("RGB", (6, 4)).save(root / f"{stem}_leftImg8bit.png")
    for kind in ("instanceIds", "labelIds", "labelTrainIds"):
        Image.fromarray(IDS).save(labels / f"{stem}_gtFine_{kind}.png")
    size = {"imgHeight": 4, "imgWidth": 6}
    (labels / f"{stem}_gtFine_polygons.json").write_text(json.dumps(size))
    check_datasets(["cityscapes_fine_sem_seg_val"], num_classes=19)
    assert score_first_class("cityscapes_fine_sem_seg_val")["IoU-road"] == pytest.approx(25.0)


# What cannot be used says why.


def test_a_stock_data_set_without_its_files_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("ade20k_sem_seg_val", "cityscapes_fine_sem_seg_val", "coco_2017_val_panoptic"):
        message = f"{name}: the function that was registered for it fails.*DETECTRON2_DATASETS"
        with pytest.raises(DatasetError, match=message):
            check_datasets([name])


def test_what_says_no_classes_is_refused_with_the_call_that_does(tmp_path):
    name = register_stock(tmp_path, stuff_classes=[])
    with pytest.raises(DatasetError) as error:
        check_datasets([name])
    assert "MetadataCatalog.get('stock_park').set(stuff_classes=[...])" in str(error.value)
    with pytest.raises(DatasetError, match="coco_2017_val: .*only thing_classes"):
        load_datasets(["coco_2017_val"])


def test_entries_without_a_label_file_are_refused(tmp_path):
    def forget(items):
        return [items[0], {"file_name": items[1]["file_name"], "annotations": []}]

    name = register_stock(tmp_path, change=forget)
    message = r"1 of 2 images have no sem_seg_file_name.*images/1\.jpg.*instances"
    with pytest.raises(DatasetError, match=message):
        load_datasets([name])
    with pytest.raises(DatasetError, match="returns no image"):
        load_datasets([register_stock(tmp_path, "stock_none", change=lambda items: [])])


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"ignore_label": 65535}, "stock_park: in its metadata, ignore_label is 65535: choose"),
        ({"ignore_label": -1}, "ignore_label is -1"),
        ({"stuff_classes": ["a", "b", "a"]}, "stock_park: several classes are named 'a'"),
        ({"ignore_label": 0.0}, "stock_park: in its metadata, ignore_label is 0.0: choose"),
        ({"stuff_classes": "abc"}, "stock_park: classes is 'abc', .*a list"),
        ({"stuff_classes": {"a": 0, "b": 1, "c": 2}}, "stock_park: classes is {'a': 0.*a list"),
        ({"stuff_classes": [0, 1, 2]}, "stock_park: class 0 is named 0, .*text"),
        ({"test_size": 64}, r"stock_park: test_size is 64: .*\(width, height\)"),
        ({"stuff_classes": [str(k) for k in range(256)]}, "stock_park: 256 classes given"),
    ],
)
def test_metadata_that_labels_cannot_follow_are_refused(tmp_path, metadata, message):
    name = register_stock(tmp_path, **metadata)
    with pytest.raises(DatasetError, match=message):
        check_datasets([name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"height": 5, "width": 6}, "0.png has 6x4 pixels, but its entry in the data set says 6x5"),
        ({"sem_seg_file_name": "gone.png", "height": 4, "width": 6}, "gone.png"),
    ],
)
def test_entries_that_do_not_fit_their_files_are_found_before_training(tmp_path, change, message):
    name = register_stock(tmp_path, change=lambda items: [{**item, **change} for item in items])
    with pytest.raises(DatasetError, match=message):
        check_datasets([name])


def test_an_image_of_another_size_than_its_label_is_found_before_training(tmp_path):
    name = register_stock(tmp_path)
    Image.new("RGB", (6, 5)).save(tmp_path / "images/1.jpg")
    with pytest.raises(DatasetError, match=r"1\.jpg has 6x5 pixels and .*1\.png 6x4.*same size"):
        check_datasets([name])


@pytest.mark.parametrize(
    ("name", "near"), [("citiscapes_val", "'cityscapes_val'"), ("stock_prak", "'stock_park'")]
)
def test_a_name_that_is_not_registered_brings_up_the_nearest(tmp_path, name, near):
    register_stock(tmp_path)
    for use in (load_datasets, check_datasets):
        with pytest.raises(DatasetError, match=f"No data set '{name}' is registered.") as error:
            use([name])
        assert near in str(error.value) and "register_sem_seg" in str(error.value)
    assert name not in MetadataCatalog.list()


def test_a_name_like_no_other_brings_up_none():
    with pytest.raises(DatasetError, match="'zzzzzz' is registered. DATASETS.TRAIN"):
        dataset_metadata("zzzzzz")


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"a", "b"}, "stock_x: classes is {.*a list.*in the order of their ids"),
        ({"b": 1, "a": 0}, "stock_x: classes is {'b': 1, 'a': 0}"),
        ("abc", "stock_x: classes is 'abc'"),
        (7, "stock_x: classes is 7"),
        (range(3), "stock_x: class 0 is named 0, .*text"),
        (["a", " "], "stock_x: class 1 is named ' '"),
    ],
)
def test_classes_that_are_no_list_of_names_are_refused(tmp_path, classes, message):
    with pytest.raises(DatasetError, match=message):
        register_sem_seg("stock_x", tmp_path, tmp_path, classes)
    assert "stock_x" not in DatasetCatalog.list()


@pytest.mark.parametrize("size", [32, (32,), (32, 0), (-1, 32), (32.0, 32.0), ("a", "b"), "ab"])
def test_a_test_size_that_is_no_pair_of_pixels_is_refused(tmp_path, size):
    with pytest.raises(DatasetError, match=r"stock_x: test_size is .*\(width, height\) in whole"):
        register_sem_seg("stock_x", tmp_path, tmp_path, ["a"], test_size=size)
    assert "stock_x" not in DatasetCatalog.list()


def test_a_test_size_may_be_a_list(tmp_path):
    name = register_stock(tmp_path, test_size=[8, 4])
    assert dataset_metadata(name).test_size == (8, 4)
    register_sem_seg("stock_x", tmp_path, tmp_path, ["a"], test_size=[8, 4])
    assert dataset_metadata("stock_x").test_size == (8, 4)


def test_classes_of_one_name_are_refused(tmp_path):
    with pytest.raises(DatasetError, match="stock_x: several classes are named 'a' and 'b'.*own"):
        register_sem_seg("stock_x", tmp_path, tmp_path, ["a", "b", "a", "c", "b"])
    assert "stock_x" not in DatasetCatalog.list()
