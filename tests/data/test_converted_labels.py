"""The check before training: train ids where label ids are expected, and published numbers."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from fishertune_d2.data.check import check_datasets
from fishertune_d2.data.check.__main__ import main
from fishertune_d2.data.dataset_description import Published
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.registration import register

BY_NAME = {dataset.name: dataset for dataset in DATASETS}


def warnings_of(caplog, names):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fishertune_d2"):
        check_datasets(names)
    return [record.getMessage() for record in caplog.records]


STREET = [[7, 7, 8, 11], [21, 23, 26, 0], [17, 1, 2, 3]]
CONVERTED = [[0, 0, 1, 2], [8, 10, 13, 255], [5, 255, 255, 255]]


@pytest.fixture
def cityscapes(tmp_path, monkeypatch):
    """Returns a function that writes label files of Cityscapes' val split."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))

    def write(*labels):
        for k, ids in enumerate(labels):
            ids = np.array(ids, dtype=np.uint8)
            for folder, suffix, picture in (
                ("leftImg8bit", "leftImg8bit", Image.new("RGB", ids.shape[::-1])),
                ("gtFine", "gtFine_labelIds", Image.fromarray(ids)),
            ):
                path = tmp_path / f"cityscapes/{folder}/val/bonn/bonn_{k:06d}_000019_{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                picture.save(path)

    return write


@pytest.mark.parametrize("copies", [1, 3])
def test_train_ids_in_place_of_label_ids_are_refused_in_any_subset(cityscapes, copies, capsys):
    cityscapes(*[CONVERTED] * copies)
    for _ in range(2):  # the second time from the cache
        with pytest.raises(
            DatasetError, match="cityscapes_val: its labels hold train ids.*Restore"
        ):
            check_datasets(["cityscapes_val"], 19)
    assert main(["cityscapes_val"]) == 1
    assert "its labels hold train ids" in capsys.readouterr().out


@pytest.mark.parametrize(
    "labels",
    [
        [STREET],
        [[[7, 7, 11, 255]]],  # a tunnel
        [[[0, 2, 8, 10, 13, 34]]],  # 34 is no train id
    ],
)
def test_label_ids_are_not_taken_for_train_ids(cityscapes, labels):
    cityscapes(*labels)
    check_datasets(["cityscapes_val"], 19)


def test_one_converted_file_among_others_is_refused(cityscapes):
    cityscapes(STREET, CONVERTED, STREET)
    with pytest.raises(
        DatasetError, match=r"1 of its 3 labels hold train ids, .*bonn_000001_.*Restore"
    ):
        check_datasets(["cityscapes_val"], 19)


def test_files_among_others_that_may_hold_train_ids_are_counted(cityscapes, caplog):
    no_sky = [[0, 1, 2, 8], [13, 5, 4, 255], [5, 255, 255, 255]]
    cityscapes(STREET, no_sky, STREET, no_sky)
    text = warnings_of(caplog, ["cityscapes_val"])[-1]
    assert "2 of its 4 labels hold no id from 19 to 34, so no car" in text
    assert "bonn_000001_" in text and "were these labels converted" in text
    cityscapes(STREET, STREET, STREET, [[7, 0, 8, 13]] * 3)  # a tunnel
    assert not any("no id from 19" in text for text in warnings_of(caplog, ["cityscapes_val"]))


def test_label_ids_that_may_be_train_ids_are_a_hint(cityscapes, caplog):
    cityscapes([[7, 7, 11, 255]])
    *_, text = warnings_of(caplog, ["cityscapes_val"])
    assert "No label holds a class above the label id 18: were these labels converted?" in text
    cityscapes(STREET)
    *_, text = warnings_of(caplog, ["cityscapes_val"])
    assert "holds wall, fence" in text and "above" not in text


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"absent": ("train",)}, "never labelled is wall, fence.*; published is train"),
        ({"shares": {"road": 30.0}}, "16.7 % of all pixels are road, known are 30.0 %"),
    ],
)
def test_complete_data_have_to_hold_what_is_published(cityscapes, published, message):
    cityscapes(STREET)
    dataset = BY_NAME["cityscapes_val"]
    try:
        register(replace(dataset, published=Published(1, **published)))
        with pytest.raises(DatasetError, match=message):
            check_datasets(["cityscapes_val"], 19)
        register(replace(dataset, published=Published(2, **published)))  # then it is not complete
        check_datasets(["cityscapes_val"], 19)
    finally:
        register(dataset)
