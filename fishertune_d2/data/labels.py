"""Meanings of the ids in label files: classes, colours, label maps and label spaces.

* A *label map* turns the ids of a data set's files into the classes that a model is trained on. It
  tells ignored ids (``IGNORE_LABEL``) from ids that it does not know (``UNKNOWN_ID``), so that
  files of another version are refused, not silently ignored.
* A *label space* holds the classes that are scored, and the scored class of each trained class.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

IGNORE_LABEL = 255
UNKNOWN_ID = -1

Color = tuple[int, int, int]

CITYSCAPES: dict[str, Color] = {
    "road": (128, 64, 128),
    "sidewalk": (244, 35, 232),
    "building": (70, 70, 70),
    "wall": (102, 102, 156),
    "fence": (190, 153, 153),
    "pole": (153, 153, 153),
    "traffic light": (250, 170, 30),
    "traffic sign": (220, 220, 0),
    "vegetation": (107, 142, 35),
    "terrain": (152, 251, 152),
    "sky": (70, 130, 180),
    "person": (220, 20, 60),
    "rider": (255, 0, 0),
    "car": (0, 0, 142),
    "truck": (0, 0, 70),
    "bus": (0, 60, 100),
    "train": (0, 80, 100),
    "motorcycle": (0, 0, 230),
    "bicycle": (119, 11, 32),
}
"""The 19 classes of Cityscapes in the order of their train ids, with their RGB colours."""

CITYSCAPES_CLASSES: tuple[str, ...] = tuple(CITYSCAPES)
CITYSCAPES_COLORS: tuple[Color, ...] = tuple(CITYSCAPES.values())


def make_label_map(trained: Mapping[int, int], ignored: Sequence[int] = ()) -> np.ndarray:
    """Builds a lookup table from file ids to train ids, given the known ids that are ignored.

    Returns:
        (256,) int16: a train id, ``IGNORE_LABEL``, or ``UNKNOWN_ID`` for ids outside the map.
    """
    table = np.full(256, UNKNOWN_ID, dtype=np.int16)
    table[list(ignored)] = IGNORE_LABEL
    for file_id, train_id in trained.items():
        table[file_id] = train_id
    return table


def identity_map_name(num_classes: int, ignore_label: int = IGNORE_LABEL) -> str:
    """Returns the name in `LABEL_MAPS` for files that hold train ids, 0 to ``num_classes - 1``.

    Args:
        num_classes: Number of classes, 1 to 255.
        ignore_label: An id that is ignored in addition to 255; it may be the id of a class.

    Raises:
        ValueError: if ``ignore_label`` is no id that a label file can hold.
    """
    whole = isinstance(ignore_label, Integral) and not isinstance(ignore_label, bool)
    if not whole or ignore_label not in range(256):
        raise ValueError(
            f"ignore_label is {ignore_label!r}: choose the id, 0 to 255, of the pixels that are "
            "to be ignored; without one, 255 alone is"
        )
    ignoring = "" if ignore_label == IGNORE_LABEL else f"_ignore_{ignore_label}"
    return f"identity_{num_classes}{ignoring}"


_IDENTITY = re.compile(r"identity_(\d+)(?:_ignore_(\d+))?")


class _LabelMaps(dict[str, np.ndarray]):
    """Label maps by name; maps of `identity_map_name` are built on first use.

    A worker process therefore finds the map of a data set that only its parent registered.
    """

    def __missing__(self, name: str) -> np.ndarray:
        numbers = _IDENTITY.fullmatch(name)
        if numbers is None or not 1 <= int(numbers[1]) <= IGNORE_LABEL:
            raise KeyError(
                f"no label map {name!r}; there are {', '.join(sorted(self))}, and identity_1 to "
                "identity_255"
            )
        ignored = {IGNORE_LABEL, int(numbers[2] or IGNORE_LABEL)}
        classes = set(range(int(numbers[1]))) - ignored
        table = make_label_map({k: k for k in classes}, sorted(ignored))
        self[name] = table
        return table


# Cityscapes' ids. GTAV's palette images use them too, and 34 for licence plates.
_LABEL_IDS = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12,
    26: 13, 27: 14, 28: 15, 31: 16, 32: 17, 33: 18,
}  # fmt: skip

# Buses and trucks are labelled car, traffic lights sign, riders bicyclist.
_CAMVID = {0: 10, 1: 2, 2: 5, 3: 0, 4: 1, 5: 8, 6: 7, 7: 4, 8: 13, 9: 11, 10: 18}

# SYNTHIA-RAND-CITYSCAPES. Its 9,400 images hold no terrain (16), truck (18) or train (20).
_SYNTHIA = {
    3: 0, 4: 1, 2: 2, 21: 3, 5: 4, 7: 5, 15: 6, 9: 7, 6: 8, 16: 9, 1: 10, 10: 11, 17: 12, 8: 13,
    18: 14, 19: 15, 20: 16, 12: 17, 11: 18,
}  # fmt: skip

# Mapillary Vistas 1.2 (ids 0 to 65; version 2.0 numbers its 124 classes anew). All projects map
# curbs to sidewalk, utility poles to pole, general lane markings to road, everyone who rides to
# rider.
_MAPILLARY = {
    13: 0, 24: 0, 2: 1, 15: 1, 17: 2, 6: 3, 3: 4, 45: 5, 47: 5, 48: 6, 50: 7, 30: 8, 29: 9, 27: 10,
    19: 11, 20: 12, 21: 12, 22: 12, 55: 13, 61: 14, 54: 15, 58: 16, 57: 17, 52: 18,
}  # fmt: skip
# Rein's map: bike lanes, crosswalks, parking and service lanes are road; curb cuts and pedestrian
# areas are sidewalk; street lights are pole; the backs and frames of signs are traffic sign.
_MAPILLARY_REIN = {7: 0, 8: 0, 10: 0, 14: 0, 23: 0, 9: 1, 11: 1, 44: 5, 46: 7, 49: 7}
# HRDA's map, which CLOUDS and VLTSeg use too, ignores these ids, and manholes are road. Scores from
# the two maps do not compare, because they count different pixels.
_MAPILLARY_HRDA = {41: 0}

LABEL_MAPS: dict[str, np.ndarray] = _LabelMaps(
    train_ids=make_label_map({k: k for k in range(19)}, ignored=[IGNORE_LABEL]),
    label_ids=make_label_map(_LABEL_IDS, ignored=[*range(35), IGNORE_LABEL]),
    camvid=make_label_map(_CAMVID, ignored=[11]),
    synthia=make_label_map(_SYNTHIA, ignored=range(23)),
    **{
        "mapillary_v1.2_rein": make_label_map(_MAPILLARY | _MAPILLARY_REIN, ignored=range(66)),
        "mapillary_v1.2_hrda": make_label_map(_MAPILLARY | _MAPILLARY_HRDA, ignored=range(66)),
    },
)
"""Label maps by name, each (256,) int16; see `make_label_map` and `identity_map_name`."""

FIRST_CHANNEL_MAPS = frozenset({"synthia"})
"""Maps of files with several channels: class ids in the first, instances in the second."""


@dataclass(frozen=True)
class LabelSpace:
    """The classes that a data set is scored in.

    Attributes:
        classes: Names of the scored classes.
        colors: Their RGB colours.
        collapse: Index of the scored class of each trained class; ``IGNORE_LABEL`` where the data
            set has no such class.
    """

    classes: tuple[str, ...]
    colors: tuple[Color, ...]
    collapse: tuple[int, ...]

    def table(self) -> np.ndarray:
        """Returns ``collapse`` as a (256,) uint8 lookup table; ids beyond it are ignored."""
        table = np.full(256, IGNORE_LABEL, dtype=np.uint8)
        table[: len(self.collapse)] = self.collapse
        return table


def require_ignore_value(value: int) -> None:
    """Raises a ValueError if MODEL.SEM_SEG_HEAD.IGNORE_VALUE is not 255."""
    if value != IGNORE_LABEL:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IGNORE_VALUE is {value}: leave it at {IGNORE_LABEL}, the value "
            "of ignored pixels in all labels after they are read. If your files ignore another id, "
            f"give it to the data set: register_sem_seg(..., ignore_label={value}), or "
            f"MetadataCatalog.get(name).set(ignore_label={value}) for a data set that Detectron2's "
            "own functions register"
        )


def same_class(one: str, other: str) -> bool:
    """Whether two names are spellings of the same class: "Traffic_Light" and "traffic light"."""
    # Case, underscores, hyphens and repeated blanks make no difference.
    words, others = (re.findall(r"[^\s_-]+", name.casefold()) for name in (one, other))
    return words == others


def identity_space(classes: Sequence[str], colors: Sequence[Color]) -> LabelSpace:
    """Returns the space in which the trained classes themselves are scored."""
    return LabelSpace(tuple(classes), tuple(colors), tuple(range(len(classes))))


def _coarser(groups: Mapping[str, Sequence[str]]) -> LabelSpace:
    """Builds a space from groups of Cityscapes classes; the first of a group lends its colour."""
    collapse = {name: k for k, members in enumerate(groups.values()) for name in members}
    return LabelSpace(
        classes=tuple(groups),
        colors=tuple(CITYSCAPES[members[0]] for members in groups.values()),
        collapse=tuple(collapse.get(name, IGNORE_LABEL) for name in CITYSCAPES),
    )


LABEL_SPACES: dict[str, LabelSpace] = {
    "cityscapes19": identity_space(CITYSCAPES_CLASSES, CITYSCAPES_COLORS),
    # CamVid's 32 fine classes were merged into these 11: walls into building; low vegetation and
    # grass into tree; traffic lights into sign; trucks, buses and trains into car; motorcycles and
    # everyone who rides into bicyclist.
    "camvid11": _coarser(
        {
            "sky": ["sky"],
            "building": ["building", "wall"],
            "pole": ["pole"],
            "road": ["road"],
            "pavement": ["sidewalk"],
            "tree": ["vegetation", "terrain"],
            "sign": ["traffic sign", "traffic light"],
            "fence": ["fence"],
            "car": ["car", "truck", "bus", "train"],
            "pedestrian": ["person"],
            "bicyclist": ["bicycle", "rider", "motorcycle"],
        }
    ),
}
"""Label spaces by name."""
