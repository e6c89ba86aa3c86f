import numpy as np
import pytest

from fishertune_d2.data.labels import (
    CITYSCAPES_CLASSES,
    IGNORE_LABEL,
    LABEL_MAPS,
    LABEL_SPACES,
    UNKNOWN_ID,
    identity_map_name,
    require_ignore_value,
)

# Every id that is trained on, as "file id>train id", in the order of the authors' or the projects'
# own tables; the number is that of all ids of the map, 255 aside.
TABLES = {
    "train_ids": (19, " ".join(f"{k}>{k}" for k in range(19))),
    "label_ids": (
        35,
        "7>0 8>1 11>2 12>3 13>4 17>5 19>6 20>7 21>8 22>9 23>10 24>11 25>12 26>13 27>14 28>15 31>16 "
        "32>17 33>18",
    ),
    "synthia": (
        23,
        "3>0 4>1 2>2 21>3 5>4 7>5 15>6 9>7 6>8 16>9 1>10 10>11 17>12 8>13 18>14 19>15 20>16 12>17 "
        "11>18",
    ),
    "mapillary_v1.2_rein": (
        66,
        "13>0 24>0 2>1 15>1 17>2 6>3 3>4 45>5 47>5 48>6 50>7 30>8 29>9 27>10 19>11 20>12 21>12 "
        "22>12 55>13 61>14 54>15 58>16 57>17 52>18 7>0 8>0 10>0 14>0 23>0 9>1 11>1 44>5 46>7 49>7",
    ),
    "mapillary_v1.2_hrda": (
        66,
        "13>0 24>0 41>0 2>1 15>1 17>2 6>3 3>4 45>5 47>5 48>6 50>7 30>8 29>9 27>10 19>11 20>12 "
        "21>12 22>12 55>13 61>14 54>15 58>16 57>17 52>18",
    ),
    "camvid": (12, "0>10 1>2 2>5 3>0 4>1 5>8 6>7 7>4 8>13 9>11 10>18"),
}


@pytest.mark.parametrize("label_map", TABLES)
def test_maps_number_by_number(label_map):
    known, pairs = TABLES[label_map]
    expected = {k: IGNORE_LABEL for k in range(known)}
    expected |= {int(a): int(b) for a, b in (pair.split(">") for pair in pairs.split())}
    table = LABEL_MAPS[label_map].tolist()
    assert {k: table[k] for k in range(known)} == expected
    assert set(table[known:255]) == {UNKNOWN_ID}


def test_every_map_has_its_table():
    assert {name for name in LABEL_MAPS if not name.startswith("identity_")} == set(TABLES)


@pytest.mark.parametrize(
    ("label_map", "file_id", "name"),
    [
        ("label_ids", 7, "road"),
        ("label_ids", 33, "bicycle"),
        ("synthia", 1, "sky"),
        ("synthia", 17, "rider"),
        ("camvid", 6, "traffic sign"),
        ("mapillary_v1.2_rein", 8, "road"),  # crosswalk
        ("mapillary_v1.2_rein", 44, "pole"),  # street light
        ("mapillary_v1.2_hrda", 41, "road"),  # manhole
        ("mapillary_v1.2_hrda", 52, "bicycle"),
    ],
)
def test_ids_lead_to_their_class(label_map, file_id, name):
    assert CITYSCAPES_CLASSES[LABEL_MAPS[label_map][file_id]] == name


def test_the_maps_of_mapillary_differ_in_eleven_ids():
    rein, hrda = LABEL_MAPS["mapillary_v1.2_rein"], LABEL_MAPS["mapillary_v1.2_hrda"]
    differing = np.flatnonzero(rein != hrda).tolist()
    assert differing == [7, 8, 9, 10, 11, 14, 23, 41, 44, 46, 49]
    assert all(IGNORE_LABEL in (rein[k], hrda[k]) for k in differing)


@pytest.mark.parametrize(
    ("label_map", "ignored", "unknown"),
    [
        ("train_ids", 255, 19),
        ("label_ids", 34, 35),  # GTAV's licence plates
        ("label_ids", 0, 254),
        ("camvid", 11, 12),
        ("camvid", 11, 255),
        ("synthia", 22, 255),
        ("mapillary_v1.2_rein", 65, 66),  # version 2.0 goes on to 123
        ("mapillary_v1.2_hrda", 44, 123),
        ("identity_3", 255, 3),
    ],
)
def test_ignored_is_not_unknown(label_map, ignored, unknown):
    assert LABEL_MAPS[label_map][ignored] == IGNORE_LABEL
    assert LABEL_MAPS[label_map][unknown] == UNKNOWN_ID


@pytest.mark.parametrize("label_map", [n for n in TABLES if n != "camvid"])
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


def test_maps_of_own_classes_are_known_by_their_name(fresh_process):
    """A worker process that never saw the registration finds them."""
    assert identity_map_name(19) == "identity_19"
    assert identity_map_name(19, 0) == "identity_19_ignore_0"
    assert fresh_process.stdout.split("\n")[1:3] == ["0 255 2 -1 255", "0 255 254 255"]


@pytest.mark.parametrize(
    "name", ["identity_0", "identity_256", "identity_3_ignore_x", "cityscapes"]
)
def test_a_map_that_does_not_exist_is_an_error(name):
    with pytest.raises(KeyError, match=f"no label map '{name}'; there are camvid, .*identity_255"):
        LABEL_MAPS[name]


@pytest.mark.parametrize("value", [0, -1, 256])
def test_another_ignore_value_is_refused_with_the_remedy(value):
    require_ignore_value(255)
    with pytest.raises(ValueError, match=rf"IGNORE_VALUE is {value}: .*register_sem_seg\("):
        require_ignore_value(value)
