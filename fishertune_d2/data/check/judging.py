"""What the classes of a data set's labels tell: blank labels, foreign ids, classes never labelled.

Shapes: C classes of the data set. Pixels are (C + 1,) int64 by class, the ignored ones last.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fishertune_d2.data.files import read_label
from fishertune_d2.data.labels import IGNORE_LABEL, LABEL_MAPS
from fishertune_d2.data.metadata import DatasetMetadata

_MAX_NAMED = 20
# Files whose own ids are looked at where those of all files seem to be train ids.
_LOOKED_AT = 50
_LAST_TRAIN_ID = 18
# Train ids of road, building, vegetation, sky and car. As label ids they are unlabelled, an image's
# border, sidewalk, rail track and fence: all of these, and in no image a plant, a car or the sky,
# is not a street.
_TELLING_TRAIN_IDS = frozenset({0, 2, 8, 10, 13})
_CONVERTED = "were these labels converted? Restore the files of the authors."


def problems_of(
    known: DatasetMetadata, dicts: Sequence[dict[str, Any]], pixels: np.ndarray
) -> list[str]:
    """Returns why a model must not be trained or scored on these labels, each with the remedy.

    Args:
        known: what is known of the data set.
        dicts: all of its entries.
        pixels: (C + 1,), over all labels.
    """
    scored = np.array(known.label_space.collapse) != IGNORE_LABEL
    if not pixels[:-1][scored].any():
        return [
            f"{known.name}: every pixel of its {len(dicts)} labels is ignored, so there is nothing "
            f"to train on or to score. Do the files hold the ids of the label map "
            f"{known.label_map!r}? 255 is always ignored: masks of 0 and 255 need a 1 in place of "
            "255."
        ]
    if _seem_train_ids(known, pixels) and _are_train_ids(dicts):
        return [
            f"{known.name}: its labels hold train ids, but the label map {known.label_map!r} "
            "needs label ids: no label holds an id from 19 to 34, so no car, no plant and no sky, "
            f"while 0 (road as a train id), 8 and 10 occur; {_CONVERTED}"
        ]
    if known.published is not None and len(dicts) == known.published.pairs:
        return differences(known, pixels)
    return []


def warning_of(known: DatasetMetadata, pixels: np.ndarray) -> str | None:
    """Names the classes that no label holds, unless they are known to be absent.

    Args:
        known: what is known of the data set.
        pixels: (C + 1,), over all labels.

    Returns:
        A text, with the likely cause where there is one; None if there is nothing to say.
    """
    expected = known.published.absent if known.published else None
    absent = [name for name in never_labelled(known, pixels) if name not in (expected or ())]
    if not absent:
        return None
    more = f" and {len(absent) - _MAX_NAMED} others" if len(absent) > _MAX_NAMED else ""
    text = (
        f"{known.name}: none of its labels holds {', '.join(absent[:_MAX_NAMED])}{more} "
        f"({len(absent)} of {len(known.classes)} classes). A model cannot learn such a class from "
        "these labels, nor can they tell how well it knows it."
    )
    return text + _hint(known, pixels)


def never_labelled(known: DatasetMetadata, pixels: np.ndarray) -> list[str]:
    """Returns the classes that the label map leads to and no label holds.

    Args:
        known: what is known of the data set.
        pixels: (C + 1,), over all labels.
    """
    reachable = set(LABEL_MAPS[known.label_map].tolist())
    return [n for k, n in enumerate(known.classes) if k in reachable and not pixels[k]]


def _hint(known: DatasetMetadata, pixels: np.ndarray) -> str:
    """The likely cause of classes that are never labelled, as far as the ids tell it."""
    table = LABEL_MAPS[known.label_map]
    if (table[0], table[IGNORE_LABEL]) == (0, IGNORE_LABEL) and pixels[0] == pixels[:-1].sum():
        if pixels[-1]:
            return (
                " All pixels are 0 or 255: these look like 0/1 masks that were scaled to 255, but "
                "255 is ignored. Convert 255 to 1."
            )
    if _seem_train_ids(known, pixels):
        return f" No label holds a class above the label id 18: {_CONVERTED}"
    return ""


def _seem_train_ids(known: DatasetMetadata, pixels: np.ndarray) -> bool:
    """Whether only classes occur whose label ids are train ids too."""
    if known.label_map != "label_ids":
        return False
    above = LABEL_MAPS["label_ids"][_LAST_TRAIN_ID + 1 : IGNORE_LABEL]
    return not pixels[np.setdiff1d(above[above >= 0], [IGNORE_LABEL])].any()


def _are_train_ids(dicts: Sequence[dict[str, Any]]) -> bool:
    """Whether the files' own ids are train ids beyond doubt."""
    chosen = np.linspace(0, len(dicts) - 1, min(len(dicts), _LOOKED_AT)).round().astype(int)
    ids: set[int] = set()
    for k in chosen.tolist():
        ids |= set(np.unique(read_label(dicts[k]["sem_seg_file_name"], "identity_255")).tolist())
    return ids <= {*range(_LAST_TRAIN_ID + 1), IGNORE_LABEL} and ids >= _TELLING_TRAIN_IDS


def differences(known: DatasetMetadata, pixels: np.ndarray) -> list[str]:
    """Compares the classes of a complete data set with the published ones.

    Args:
        known: what is known of the data set, with published numbers.
        pixels: (C + 1,), over all labels.

    Returns:
        What differs by more than copies of the same files can, each with the remedy.
    """
    published, problems = known.published, []
    remedy = f"The label map {known.label_map!r} needs the ids that the authors ship: {_CONVERTED}"
    absent = never_labelled(known, pixels)
    if published.absent is not None and set(absent) != set(published.absent):
        problems.append(
            f"{known.name}: never labelled is {_list(absent)}; published is "
            f"{_list(published.absent)}. {remedy}"
        )
    for name, usual in published.shares.items():
        share = 100 * pixels[known.classes.index(name)] / pixels.sum()
        if abs(share - usual) > usual / 4:
            problems.append(
                f"{known.name}: {share:.1f} % of all pixels are {name}, known are {usual:.1f} %. "
                f"{remedy}"
            )
    return problems


def _list(names: Sequence[str]) -> str:
    return ", ".join(names) or "no class"
