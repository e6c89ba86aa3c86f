import numpy as np
import pytest

from fishertune_d2.data.labels import (
    CITYSCAPES_CLASSES,
    IGNORE_LABEL,
    LABEL_MAPS,
    LABEL_SPACES,
    UNKNOWN_ID,
)


def trained_as(label_map: str, file_id: int) -> str:
    return CITYSCAPES_CLASSES[LABEL_MAPS[label_map][file_id]]


@pytest.mark.parametrize(
    ("label_map", "file_id", "name"),
    [
        ("train_ids", 0, "road"),
        ("train_ids", 18, "bicycle"),
        ("label_ids", 7, "road"),
        ("label_ids", 24, "person"),
        ("label_ids", 33, "bicycle"),
        ("camvid", 0, "sky"),
        ("camvid", 3, "road"),
        ("camvid", 6, "traffic sign"),
        ("camvid", 10, "bicycle"),
        ("mapillary_rein", 13, "road"),
        ("mapillary_rein", 8, "road"),  # crosswalk
        ("mapillary_rein", 44, "pole"),  # street light
        ("mapillary_rein", 27, "sky"),
        ("mapillary_rein", 52, "bicycle"),
    ],
)
def test_ids_lead_to_their_class(label_map, file_id, name):
    assert trained_as(label_map, file_id) == name


@pytest.mark.parametrize(
    ("label_map", "ignored", "unknown"),
    [
        ("train_ids", 255, 19),
        ("label_ids", 34, 35),  # GTAV's licence plates
        ("label_ids", 0, 254),
        ("camvid", 11, 12),
        ("camvid", 11, 255),
        ("mapillary_rein", 65, 66),  # version 2.0 goes on to 123
        ("identity_3", 255, 3),
    ],
)
def test_ignored_is_not_unknown(label_map, ignored, unknown):
    assert LABEL_MAPS[label_map][ignored] == IGNORE_LABEL
    assert LABEL_MAPS[label_map][unknown] == UNKNOWN_ID


@pytest.mark.parametrize("label_map", ["train_ids", "label_ids", "mapillary_rein"])
def test_maps_reach_all_19_classes(label_map):
    assert set(range(19)) <= set(LABEL_MAPS[label_map].tolist())


def test_camvid_labels_and_predictions_meet_in_the_same_class():
    space = LABEL_SPACES["camvid11"]
    ids = np.arange(11)
    assert space.table()[LABEL_MAPS["camvid"][ids]].tolist() == ids.tolist()
    scored = {name: space.classes[space.collapse[k]] for k, name in enumerate(CITYSCAPES_CLASSES)}
    assert scored["bus"] == "car" and scored["traffic light"] == "sign"
    assert scored["rider"] == scored["motorcycle"] == "bicyclist"
    assert scored["terrain"] == "tree" and scored["wall"] == "building"
    assert space.table()[IGNORE_LABEL] == IGNORE_LABEL
