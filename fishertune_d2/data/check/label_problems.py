"""Judges a data set by its pixel counts: blank labels, foreign ids, classes that no label holds.

Shapes: N labels, C classes of the data set. ``counts`` are (N, C + 1) int64 pixels by class,
ignored pixels last; ``pixels`` are their (C + 1,) sums over the labels.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from fishertune_d2.data.dataset_description import DatasetMetadata, Published
from fishertune_d2.data.image_files import read_label
from fishertune_d2.data.labels import IGNORE_LABEL, LABEL_MAPS, UNKNOWN_ID
from fishertune_d2.files import first_names

_MAX_NAMED = 20
# If the classes seem odd, the ids of this many files are read again.
_LOOKED_AT = 50
_LAST_TRAIN_ID = 18
# The train ids of road, building, vegetation, sky and car. As label ids they mean unlabelled, image
# border, sidewalk, rail track and fence. A set with all five, but with no plant, car or sky in any
# image, shows no streets. A set with fewer of them may show a tunnel.
_TELLING = frozenset({0, 2, 8, 10, 13})
_LIKELY = 4
# The remedy for labels that hold train ids.
_CONVERTED = "were these labels converted? Restore the files of the authors."
_NO_LATER_ID = "no id from 19 to 34, so no car, no plant and no sky"
_CERTAIN = f"{_NO_LATER_ID}, while 0 (road as a train id), 8 and 10 occur; {_CONVERTED}"


def judge(
    known: DatasetMetadata, dicts: Sequence[dict[str, Any]], counts: np.ndarray
) -> tuple[list[str], list[str]]:
    """Finds problems of the labels, or properties that are unusual but may be right.

    Returns:
        Problems that forbid training and scoring on these labels, each with the remedy; and
        warnings, if there are no problems.
    """
    pixels = counts.sum(axis=0)
    scored = np.array(known.label_space.collapse) != IGNORE_LABEL
    if not pixels[:-1][scored].any():
        problem = (
            f"{known.name}: every pixel of its {len(dicts)} labels is ignored, so there is nothing "
            f"to train on or to score. Do the files hold the ids of the label map "
            f"{known.label_map!r}? 255 is always ignored: masks of 0 and 255 need a 1 in place of "
            "255."
        )
        return [problem], []
    converted, maybe_converted = _converted(known, dicts, counts)
    if converted:
        return [converted], []
    if known.published is not None and len(dicts) == known.published.pairs:
        problems = _class_differences(known, known.published, pixels)
        if problems:
            return problems, []
    absent = _absent(known, pixels)
    scaled = _scaled(known, dicts, counts)
    # One warning if the second says why the classes are absent.
    if absent and scaled and pixels[0] == pixels[:-1].sum():
        absent, scaled = f"{absent} {scaled}", None
    elif absent and maybe_converted and len(_without_later_ids(known, counts)) == len(dicts):
        absent, maybe_converted = f"{absent} {maybe_converted}", None
    texts = (absent, scaled, maybe_converted)
    return [], [f"{known.name}: {text}" for text in texts if text]


def _absent(known: DatasetMetadata, pixels: np.ndarray) -> str | None:
    """Names the classes that no label holds, unless they are known to be absent."""
    expected = known.published.absent if known.published else None
    absent = [name for name in never_labelled(known, pixels) if name not in (expected or ())]
    if not absent:
        return None
    return (
        f"none of its labels holds {first_names(absent, _MAX_NAMED)} ({len(absent)} of "
        f"{len(known.classes)} classes). A model cannot learn such a class from these labels, and "
        "they cannot test it."
    )


def never_labelled(known: DatasetMetadata, pixels: np.ndarray) -> list[str]:
    """Returns the classes that the label map leads to and no label holds; pixels are (C + 1,)."""
    reachable = set(LABEL_MAPS[known.label_map].tolist())
    return [n for k, n in enumerate(known.classes) if k in reachable and not pixels[k]]


def _scaled(
    known: DatasetMetadata, dicts: Sequence[dict[str, Any]], counts: np.ndarray
) -> str | None:
    """Counts the labels that look like masks of 0 and 1 whose 1 became 255."""
    table = LABEL_MAPS[known.label_map]
    classes = np.setdiff1d(table, [IGNORE_LABEL, UNKNOWN_ID])
    if (table[0], table[IGNORE_LABEL]) != (0, IGNORE_LABEL) or len(classes) < 2:
        return None
    nothing_else = counts[:, 0] == counts[:, :-1].sum(axis=1)
    found = np.flatnonzero(nothing_else & (counts[:, 0] > 0) & (counts[:, -1] > 0))
    # With more than two classes, single images may well hold the class 0 alone.
    if not len(found) or (len(classes) > 2 and 2 * len(found) <= len(dicts)):
        return None
    if (table == IGNORE_LABEL).sum() > 1:  # then an ignored pixel need not be 255
        kept = [k for k, ids in _own_ids(dicts, found).items() if ids == {0, IGNORE_LABEL}]
        if not kept:
            return None
        found = found if len(kept) == _LOOKED_AT else np.array(kept)
    cause = "these look like 0/1 masks that were scaled to 255, but 255 is ignored. Convert 255 to"
    if counts[:, 0].sum() == counts[:, :-1].sum():
        return f"All pixels are 0 or 255: {cause} 1."
    return (
        f"{len(found)} of {len(dicts)} labels hold only 0 and 255, the first of them "
        f"{dicts[found[0]]['sem_seg_file_name']}: {cause} 1 in them."
    )


def _converted(
    known: DatasetMetadata, dicts: Sequence[dict[str, Any]], counts: np.ndarray
) -> tuple[str | None, str | None]:
    """Says which labels hold train ids instead of label ids: a certain problem, or a warning."""
    found = _without_later_ids(known, counts)
    if not len(found):
        return None, None
    train_ids = {*range(_LAST_TRAIN_ID + 1), IGNORE_LABEL}
    own = {k: ids for k, ids in _own_ids(dicts, found).items() if ids <= train_ids}
    more = "at least " if len(found) > _LOOKED_AT else ""
    if len(found) == len(dicts):
        if len(own) == min(len(dicts), _LOOKED_AT) and set().union(*own.values()) >= _TELLING:
            return (
                f"{known.name}: its labels hold train ids, but the label map {known.label_map!r} "
                f"needs label ids: they hold {_CERTAIN}"
            ), None
        return None, f"No label holds a class above the label id 18: {_CONVERTED}"
    certain = [k for k, ids in own.items() if ids >= _TELLING]
    if certain:
        return (
            f"{known.name}: {more}{len(certain)} of its {len(dicts)} labels hold train ids, but "
            f"the label map {known.label_map!r} needs label ids: the first of them, "
            f"{dicts[certain[0]]['sem_seg_file_name']}, holds {_CERTAIN}"
        ), None
    likely = [k for k, ids in own.items() if 0 in ids and len(ids & _TELLING) >= _LIKELY]
    if not likely:
        return None, None
    return None, (
        f"{more}{len(likely)} of its {len(dicts)} labels hold {_NO_LATER_ID}, but other ids that "
        f"are frequent as train ids, the first of them {dicts[likely[0]]['sem_seg_file_name']}: "
        f"{_CONVERTED}"
    )


def _without_later_ids(known: DatasetMetadata, counts: np.ndarray) -> np.ndarray:
    """Returns the indices of labels whose classes all have label ids that are train ids too."""
    if known.label_map != "label_ids":
        return np.empty(0, dtype=np.int64)
    above = LABEL_MAPS["label_ids"][_LAST_TRAIN_ID + 1 : IGNORE_LABEL]
    later = np.setdiff1d(above[above >= 0], [IGNORE_LABEL])
    return np.flatnonzero(~counts[:, later].any(axis=1))


def _own_ids(dicts: Sequence[dict[str, Any]], among: np.ndarray) -> dict[int, set[int]]:
    """Reads the ids in at most `_LOOKED_AT` files, evenly spread over ``among``."""
    places = np.linspace(0, len(among) - 1, min(len(among), _LOOKED_AT)).round().astype(int)
    return {
        k: set(np.unique(read_label(dicts[k]["sem_seg_file_name"], "identity_255")).tolist())
        for k in among[places].tolist()
    }


def _class_differences(
    known: DatasetMetadata, published: Published, pixels: np.ndarray
) -> list[str]:
    """Says where classes and shares of a complete data set differ from the published numbers."""
    problems = []
    remedy = f"The label map {known.label_map!r} needs the ids that the authors ship: {_CONVERTED}"
    absent = never_labelled(known, pixels)
    if published.absent is not None and set(absent) != set(published.absent):
        problems.append(
            f"{known.name}: never labelled is {', '.join(absent) or 'no class'}; published is "
            f"{', '.join(published.absent) or 'no class'}. {remedy}"
        )
    for name, usual in published.shares.items():
        share = 100 * pixels[known.classes.index(name)] / pixels.sum()
        if abs(share - usual) > usual / 4:
            problems.append(
                f"{known.name}: {share:.1f} % of all pixels are {name}, known are {usual:.1f} %. "
                f"{remedy}"
            )
    return problems
