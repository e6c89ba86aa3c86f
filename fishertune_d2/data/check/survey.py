"""What a data set on disk holds, against what is known of it: numbers, sizes, classes."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from tabulate import tabulate

from fishertune_d2.data.check.judging import judge, never_labelled
from fishertune_d2.data.check.reading import (
    bad_files,
    for_each_pair,
    keep,
    read_pair,
    state_of_files,
)
from fishertune_d2.data.files import DatasetError
from fishertune_d2.data.labels import LABEL_MAPS
from fishertune_d2.data.metadata import metadata_of
from fishertune_d2.data.pairs import (
    Published,
    SemSegDataset,
    datasets_root,
    folders,
    load_pairs,
)
from fishertune_d2.data.rows import DATASETS
from fishertune_d2.files import first_names

# Data sets beside each other in the table of classes; more do not fit a terminal.
_COLUMNS = 5
_REMEDY = "datasets/README.md shows the tree and where the files come from."


@dataclass
class Survey:
    """What was found of one data set.

    Attributes:
        row: the data set.
        pixels: (C + 1,) int64, label pixels by class; the last entry counts the ignored.
        pairs: how many pairs of an image and a label there are.
        sizes: how many of them have which (width, height).
        problems: what is wrong, each with the remedy.
    """

    row: SemSegDataset
    pixels: np.ndarray
    pairs: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    def ignored(self) -> float | None:
        """Returns the percentage of ignored pixels; None where nothing was read."""
        total = self.pixels.sum()
        return float(100 * self.pixels[-1] / total) if total else None

    def shares(self) -> dict[str, float]:
        """Returns the percentage of the labelled pixels of each class that the labels can hold."""
        labelled = self.pixels[:-1]
        total = max(int(labelled.sum()), 1)
        reachable = set(LABEL_MAPS[self.row.label_map].tolist())
        return {
            name: 100 * count / total
            for k, (name, count) in enumerate(zip(self.row.classes, labelled.tolist(), strict=True))
            if k in reachable
        }

    def absent(self) -> list[str]:
        """Returns the classes that could occur and do not."""
        return never_labelled(metadata_of(self.row), self.pixels)


def rows_on_disk() -> list[SemSegDataset]:
    """Returns the rows whose folders exist, but for the built-in data: asking would draw them."""
    return [
        row
        for row in DATASETS
        if row.root is datasets_root
        and any(
            folders(row.root(), image_dir) and folders(row.root(), label_dir)
            for image_dir, label_dir in row.dirs()
        )
    ]


def survey(row: SemSegDataset, pixels: bool = True) -> Survey:
    """Loads a data set, reads all of its files, and compares it with what is published.

    Args:
        row: the data set.
        pixels: whether to; without, only names and headers are read, which is quick.
    """
    found = Survey(row, np.zeros(len(row.classes) + 1, dtype=np.int64))
    try:
        dicts = load_pairs(row)
    except DatasetError as error:
        found.problems.append(str(error))
        return found
    found.pairs = len(dicts)
    found.sizes = Counter((item["width"], item["height"]) for item in dicts)
    if row.published is not None:
        found.problems += _differences(found, row.published)
    counts = _read_pixels(found, dicts) if pixels else None
    if counts is not None:
        found.problems += judge(metadata_of(row), dicts, counts)[0]
    return found


def _read_pixels(found: Survey, dicts: list[dict[str, Any]]) -> np.ndarray | None:
    """Reads every file, and returns the counts of each label if all of them can be read."""
    state, read = state_of_files(dicts), partial(read_pair, num_classes=len(found.row.classes))
    pairs = list(for_each_pair(found.row.name, dicts, read))
    bad = [pair for pair in pairs if isinstance(pair, str)]
    good = [pair for pair in pairs if not isinstance(pair, str)]
    if good:
        found.pixels = np.sum(good, axis=0)
    if bad:
        found.problems.append(bad_files(found.row.name, bad))
        return None
    counts = np.stack(good)
    keep(found.row.name, state, counts)
    return counts


def _differences(found: Survey, published: Published) -> list[str]:
    """Compares with the published numbers of pairs and of pixels."""
    name, problems = found.row.name, []
    if found.pairs < published.pairs:
        problems.append(
            f"{name}: {found.pairs} pairs, {published.pairs} are published. Download and unpack "
            f"what is missing. {_REMEDY}"
        )
    if found.pairs > published.pairs:
        problems.append(
            f"{name}: {found.pairs} pairs, {published.pairs} are published. Remove the files that "
            f"came from another split or data set. {_REMEDY}"
        )
    others = {size: n for size, n in found.sizes.items() if size not in published.sizes}
    if published.sizes and others:
        problems.append(
            f"{name}: {sum(others.values())} pairs have {_format_sizes(others)} pixels, published "
            f"are {_format_sizes(dict.fromkeys(published.sizes))}. Use the files at the size in "
            "which they are published: the tests resize by themselves."
        )
    return problems


def _format_sizes(sizes: dict[tuple[int, int], int | None]) -> str:
    """Writes the most frequent sizes, and how many others there are."""
    shown = [
        f"{width}x{height}" + (f" ({count})" if count is not None and len(sizes) > 1 else "")
        for (width, height), count in sorted(sizes.items(), key=lambda s: (-(s[1] or 0), s[0]))
    ]
    return first_names(shown, 2) if shown else ""


def format_surveys(surveys: Sequence[Survey]) -> str:
    """Formats numbers, sizes and classes as tables, and below them all problems.

    Args:
        surveys: what `survey` returned for each data set.

    Returns:
        Lines of text. Shares are percentages; "-" where there is no number.
    """
    head = ["data set", "pairs", "published", "width x height", "ignored %", "never labelled"]
    rows = [
        [
            found.row.name,
            found.pairs,
            found.row.published.pairs if found.row.published else None,
            _format_sizes(found.sizes) or None,
            found.ignored(),
            (", ".join(found.absent()) or "none") if found.pixels.any() else None,
        ]
        for found in surveys
    ]
    parts = [tabulate(rows, head, floatfmt=".1f", missingval="-")]

    read = [found for found in surveys if found.pixels.any()]
    parts += [_class_table(read[i : i + _COLUMNS]) for i in range(0, len(read), _COLUMNS)]
    problems = [problem for found in surveys for problem in found.problems]
    parts += [f"Problem: {problem}" for problem in problems] or ["No problem found."]
    return "\n\n".join(parts)


def _class_table(surveys: Sequence[Survey]) -> str:
    shares = [found.shares() for found in surveys]
    classes = dict.fromkeys(name for found in surveys for name in found.row.classes)
    return tabulate(
        [[name, *(share.get(name) for share in shares)] for name in classes],
        ["% of labelled pixels", *(found.row.name for found in surveys)],
        floatfmt=".3f",
        missingval="-",
    )
