"""The check before training: which classes the labels hold, and whether that can be right."""

import logging
from dataclasses import replace

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from PIL import Image

from fishertune_d2.data import class_counts, load_datasets, register_sem_seg
from fishertune_d2.data.check import check_datasets, pixel_counts
from fishertune_d2.data.dataset_description import Published
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.labels import LabelSpace
from fishertune_d2.data.registration import register

CLASSES = ["path", "grass", "bench"]
BY_NAME = {dataset.name: dataset for dataset in DATASETS}


def write_pairs(folder, labels):
    """Writes black photos and the given masks, by the stem of their names."""
    for stem, ids in labels.items():
        ids = np.array(ids, dtype=np.uint8)
        for kind, picture in (
            ("photos", Image.new("RGB", ids.shape[::-1])),
            ("masks", Image.fromarray(ids)),
        ):
            (folder / kind).mkdir(exist_ok=True)
            picture.save(folder / kind / f"{stem}.png")


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Returns a function that writes labels and registers them as "own_park"."""
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))

    def write(*labels, classes=CLASSES, **kwargs):
        write_pairs(tmp_path, dict(enumerate(labels)))
        register_sem_seg("own_park", tmp_path / "photos", tmp_path / "masks", classes, **kwargs)

    yield write
    if "own_park" in DatasetCatalog.list():
        DatasetCatalog.remove("own_park")
    MetadataCatalog.pop("own_park", None)


def warnings_of(caplog, names=("own_park",)):
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="fishertune_d2"):
        check_datasets(names)
    return [record.getMessage() for record in caplog.records]


def test_a_class_that_no_label_holds_is_named_once_at_every_start(own, caplog, monkeypatch):
    own([[0, 0, 255]], [[0, 0, 2]])
    (text,) = warnings_of(caplog, ["own_park", "own_park"])
    assert "own_park: none of its labels holds grass (1 of 3 classes)" in text
    monkeypatch.setattr(pixel_counts, "read_image", lambda path: pytest.fail("read again"))
    assert warnings_of(caplog) == [text]


def test_all_classes_labelled_is_no_warning(own, caplog):
    own([[0, 0, 255]], [[1, 0, 2]])
    assert warnings_of(caplog) == []


def test_many_absent_classes_are_counted(own, caplog):
    own([[3]], classes=[f"c{k}" for k in range(40)])
    (text,) = warnings_of(caplog)
    assert "c0, c1, c2, c4" in text and " and 19 more (39 of 40 classes)" in text


@pytest.mark.parametrize(
    ("ids", "classes", "hint"),
    [
        ([[0, 255]], ["ground", "crack"], True),
        ([[0, 255]], CLASSES, True),
        ([[0, 0]], ["ground", "crack"], False),  # nothing was scaled: there is no crack
        ([[1, 255]], ["ground", "crack"], False),
    ],
)
def test_masks_of_0_and_255_get_a_hint_of_their_own(own, caplog, ids, classes, hint):
    own(ids, classes=classes)
    (text,) = warnings_of(caplog)
    assert ("masks that were scaled to 255" in text and "Convert 255 to 1" in text) is hint


def test_masks_of_0_and_255_among_others_are_counted(own, caplog):
    own([[0, 255]], [[0, 1]], [[255, 0]], [[0, 0]], classes=["ground", "crack"])
    (text,) = warnings_of(caplog)
    assert "own_park: 2 of 4 labels hold only 0 and 255, the first of them" in text
    assert "masks/0.png" in text and "Convert 255 to 1" in text
    own([[0, 255]], [[0, 1]], [[255, 0]], [[0, 2]], classes=CLASSES)  # of three classes, no wonder
    assert warnings_of(caplog) == []
    own([[0, 255]], [[0, 255]], [[255, 0]], [[1, 2]], classes=CLASSES)
    assert "3 of 4 labels hold only 0 and 255" in warnings_of(caplog)[0]


def test_masks_of_0_and_another_ignored_id_are_not_said_to_hold_255(own, caplog):
    own([[0, 254]], [[0, 254]], classes=["ground", "crack"], ignore_label=254)
    (text,) = warnings_of(caplog)
    assert "none of its labels holds crack" in text and "255" not in text
    own([[0, 254]], [[0, 1]], classes=["ground", "crack"], ignore_label=254)
    assert warnings_of(caplog) == []
    own([[0, 255]], [[0, 1]], classes=["ground", "crack"], ignore_label=254)
    assert "1 of 2 labels hold only 0 and 255" in warnings_of(caplog)[0]


def test_one_class_and_255_is_a_choice(own, caplog):
    own([[0, 255]], classes=["crack"])
    assert warnings_of(caplog) == []


def test_an_ignored_class_is_not_missed(own, caplog):
    own([[0, 1, 2, 255]], ignore_label=0)
    assert warnings_of(caplog) == []
    assert class_counts(["own_park"]).tolist() == [[0, 1, 1, 2]]


@pytest.mark.parametrize(("ids", "ignored"), [([[255, 255]], 255), ([[0, 255]], 0)])
def test_labels_without_a_labelled_pixel_are_refused(own, ids, ignored):
    own(ids, ids, ignore_label=ignored)
    with pytest.raises(DatasetError, match="own_park: every pixel of its 2 labels is ignored"):
        check_datasets(["own_park"])


def test_labels_of_classes_that_are_not_scored_are_no_labels(camvid_tree):
    camvid_tree()
    dataset = BY_NAME["camvid_day_train"]
    collapse = [255 if name == "sky" else k for k, name in enumerate(dataset.classes)]
    space = LabelSpace(dataset.classes, dataset.colors, tuple(collapse))
    folder = camvid_tree(("a", "b"), size=(1, 4))
    for ids, refused in (([[0, 0, 11, 11]], True), ([[0, 0, 1, 11]], False)):  # 0 is sky
        for stem in ("a", "b"):
            Image.fromarray(np.array(ids, dtype=np.uint8)).save(folder / f"trainannot/{stem}.png")
        try:
            register(replace(dataset, label_space=space))
            if refused:
                with pytest.raises(DatasetError, match="every pixel of its 2 labels is ignored"):
                    check_datasets([dataset.name])
            else:
                check_datasets([dataset.name])
        finally:
            register(dataset)


def test_an_image_without_a_labelled_pixel_is_no_error(own, caplog):
    own([[255, 255]], [[0, 1], [2, 2]])
    assert warnings_of(caplog) == []


def test_absent_classes_that_are_published_are_no_warning(camvid_tree, caplog):
    camvid_tree()
    ids = np.array([[8, 8, 1, 11]], dtype=np.uint8)
    folder = camvid_tree(("a",), size=(1, 4))
    for stem in ("a", "b"):
        Image.new("RGB", (4, 1)).save(folder / f"train/{stem}.jpg")
        Image.fromarray(ids).save(folder / f"trainannot/{stem}.png")
    dataset = BY_NAME["camvid_day_train"]
    names = [name for name in dataset.classes if name not in ("building", "car")]
    try:
        register(replace(dataset, published=Published(9, absent=tuple(names))))
        assert warnings_of(caplog, [dataset.name])[1:] == []  # the first counts the pairs
        register(replace(dataset, published=Published(9, absent=tuple(names[1:]))))
        assert f"holds {names[0]} (1 of 19 classes)" in warnings_of(caplog, [dataset.name])[1]
    finally:
        register(dataset)


# Several data sets of one run.


@pytest.fixture
def two(tmp_path, monkeypatch):
    """Returns a function that registers "own_day" and "own_night" with the given classes."""
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    write_pairs(tmp_path, {"0": [[0, 1, 2]]})
    names = ("own_day", "own_night")

    def write(*classes):
        for name, own_classes in zip(names, classes, strict=True):
            register_sem_seg(name, tmp_path / "photos", tmp_path / "masks", own_classes)
        return names

    yield write
    for name in names:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.mark.parametrize(
    ("first", "other", "message"),
    [
        ("abc", "cba", "3 and 3: class 0 is 'a' in own_day and 'c' in own_night"),
        ("abc", "abd", "3 and 3: class 2 is 'c' in own_day and 'd' in own_night"),
        ("abc", "abcd", "3 and 4: class 3 is nothing in own_day and 'd' in own_night"),
    ],
)
def test_data_sets_of_one_run_have_the_same_classes_in_the_same_order(two, first, other, message):
    names = two([*first], [*other])
    message = rf"own_day and own_night have different classes \({message}\).*in the same order"
    with pytest.raises(DatasetError, match=message):
        check_datasets(names)
    with pytest.raises(DatasetError, match=message):
        load_datasets(names)
    check_datasets(names[1:])  # alone, it is as it should be


def test_spellings_of_the_same_classes_are_no_difference(two):
    names = two(["traffic light", "path", "grass"], ["Traffic_Light", "Path ", "grass"])
    check_datasets(names)
    assert len(load_datasets(names)) == 2


# What is kept in the cache.


def test_counts_are_pixels_by_class_and_ignored(own):
    own([[0, 0, 2, 255]], [[1, 1, 1, 1]])
    counts = class_counts(["own_park"])
    assert counts.tolist() == [[2, 0, 1, 1], [0, 4, 0, 0]] and counts.dtype == np.int64
    assert class_counts(["own_park", "own_park"]).tolist() == [*counts.tolist()] * 2


@pytest.mark.parametrize("damage", ["old stamp", "cut", "other data", "gone"])
def test_a_damaged_or_old_note_is_read_again(own, tmp_path, monkeypatch, damage):
    own([[0, 1, 2]], [[1, 1, 1]])
    counts, file = class_counts(["own_park"]), tmp_path / "cache/checked/own_park.npz"
    whole = file.read_bytes()
    if damage == "old stamp":
        file.write_text("0" * 64)
    elif damage == "cut":
        file.write_bytes(whole[: len(whole) // 2])
    elif damage == "other data":
        state = pixel_counts.state_of_files(DatasetCatalog.get("own_park"))
        pixel_counts.keep("own_park", state, counts[:1])
    else:
        file.unlink()
    read = []
    original = pixel_counts.read_image
    monkeypatch.setattr(
        pixel_counts, "read_image", lambda path: read.append(path) or original(path)
    )
    assert class_counts(["own_park"]).tolist() == counts.tolist() and len(read) == 2
    assert class_counts(["own_park"]).tolist() == counts.tolist() and len(read) == 2
    assert [path.name for path in file.parent.iterdir()] == ["own_park.npz"]


def test_another_meaning_of_the_same_files_is_read_again(own):
    own([[0, 1, 2]])
    check_datasets(["own_park"])
    own([[0, 1, 2]], classes=[*CLASSES, "tree"])
    assert class_counts(["own_park"]).tolist() == [[1, 1, 1, 0, 0]]
    own([[0, 1, 2]], ignore_label=1)
    assert class_counts(["own_park"]).tolist() == [[1, 0, 1, 1]]


def test_other_processes_get_the_counts_of_the_first(own, monkeypatch):
    own([[0, 1, 2]])
    monkeypatch.setattr(comm, "is_main_process", lambda: False)
    monkeypatch.setattr(comm, "all_gather", lambda data: ["of the first", data])
    monkeypatch.setattr(pixel_counts, "read_image", lambda path: pytest.fail("read here"))
    assert class_counts(["own_park"]) == "of the first"
