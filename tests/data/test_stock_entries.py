"""What functions that others registered return: pairs of a form and names that make sense."""

import logging

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fishertune_d2.data import check_datasets, load_datasets
from fishertune_d2.data.image_files import DatasetError


@pytest.fixture
def stock(tmp_path, monkeypatch):
    """Returns a function that draws pairs of the given names and registers what is made of them."""
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))

    def write(images=("0.jpg", "1.jpg"), labels=("0.png", "1.png"), change=lambda items: items):
        items = []
        for image, label in zip(images, labels, strict=True):
            item = {
                "file_name": tmp_path / "i" / image,
                "sem_seg_file_name": tmp_path / "l" / label,
            }
            for path, mode in zip(item.values(), ("RGB", "L"), strict=True):
                path.parent.mkdir(exist_ok=True)
                Image.fromarray(np.zeros((2, 3), np.uint8)).convert(mode).save(path)
            items.append({key: str(path) for key, path in item.items()})
        DatasetCatalog.register("stock_park", lambda: change(items))
        MetadataCatalog.get("stock_park").set(stuff_classes=["path"])
        return items

    yield write
    DatasetCatalog.remove("stock_park")
    MetadataCatalog.remove("stock_park")


@pytest.mark.parametrize("kind", [iter, tuple])
def test_any_series_of_entries_will_do(stock, kind):
    stock(change=kind)
    assert len(load_datasets(["stock_park"])) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda items: None, "the function that was registered for it returns None, and not a"),
        (lambda items: 7, "registered for it returns 7, and not a list"),
        (lambda items: ["a.png"], "an entry is 'a.png', and not a dict"),
        (lambda items: iter(()), "returns no image"),
        (
            lambda items: [items[0], {**items[1], "sem_seg_file_name": None}],
            r"1 of 2 images have no sem_seg_file_name.* the first of them .*i/1\.jpg",
        ),
        (
            lambda items: [items[0], {**items[1], "sem_seg_file_name": ""}],
            "1 of 2 images have no sem_seg_file_name",
        ),
        (
            lambda items: [items[0], {"sem_seg_file_name": items[1]["sem_seg_file_name"]}],
            "1 of 2 entries have no file_name, the path of an image",
        ),
        (lambda items: [{**items[0], "file_name": None}], "1 of 1 entries have no file_name"),
    ],
)
def test_entries_that_are_no_pairs_are_refused(stock, change, message):
    stock(change=change)
    with pytest.raises(DatasetError, match=f"stock_park: .*{message}"):
        load_datasets(["stock_park"])


@pytest.mark.parametrize(
    ("images", "labels", "odd"),
    [
        (("0.jpg", "1.jpg", "2.jpg"), ("0.png", "1.png", "2.png"), 0),
        (("a_rgb.jpg", "b_rgb.jpg"), ("gt_a_mask.png", "gt_b_mask.png"), 0),
        (("one.jpg",), ("other.png",), 0),
        (("1.jpg", "2.jpg", "3.jpg"), ("0.png", "1.png", "3.png"), 2),
        (("1_rgb.jpg", "2_rgb.jpg", "3_rgb.jpg"), ("0_gt.png", "1_gt.png", "2_gt.png"), 3),
    ],
)
def test_pairs_of_files_with_different_names_are_one_warning(stock, caplog, images, labels, odd):
    """load_sem_seg sorts images and labels, so that one missing file shifts all that follow."""
    items = stock(images, labels)
    with caplog.at_level(logging.WARNING, logger="fishertune_d2"):
        check_datasets(["stock_park"])
    texts = [record.getMessage() for record in caplog.records]
    if not odd:
        assert texts == []
        return
    (text,) = texts
    assert f"stock_park: in {odd} of {len(images)} pairs image and label have different" in text
    assert f"{items[0]['file_name']} and {items[0]['sem_seg_file_name']}" in text
