"""Surveys a data set on disk, and compares it with its published numbers, sizes and classes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from tabulate import tabulate

from fishertune_d2.data.check.label_problems import judge, never_labelled
from fishertune_d2.data.check.pixel_counts import read_pairs
from fishertune_d2.data.dataset_description import Published, SemSegDataset, datasets_root
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.labels import LABEL_MAPS
from fishertune_d2.data.load_pairs import choose_dirs, load_pairs
from fishertune_d2.files import first_names

# Columns of the table of classes: more data sets side by side do not fit a terminal.
_COLUMNS = 5
_REMEDY = "datasets/README.md shows the tree and where the files come from."


@dataclass
class Survey:
    """Findings about one data set.

    Attributes:
        dataset: The data set.
        pixels: (C + 1,) int64, label pixels by class, ignored pixels last.
        pairs: Number of pairs of an image and a label.
        sizes: Number of pairs of each (width, height).
        problems: Problems, each with the remedy.
        warnings: Unusual properties that may be right.
    """

    dataset: SemSegDataset
    pixels: np.ndarray
    pairs: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def ignored(self) -> float | None:
        """Returns the percentage of ignored pixels; None where nothing was read."""
        total = self.pixels.sum()
        return float(100 * self.pixels[-1] / total) if total else None

    def shares(self) -> dict[str, float]:
        """Returns the percentage of the labelled pixels of each class that the labels can hold."""
        labelled = self.pixels[:-1]
        total = max(int(labelled.sum()), 1)
        reachable = set(LABEL_MAPS[self.dataset.label_map].tolist())
        return {
            name: 100 * int(labelled[k]) / total
            for k, name in enumerate(self.dataset.classes)
            if k in reachable
        }

    def absent(self) -> list[str]:
        """Returns the classes that could occur and do not."""
        return never_labelled(self.dataset, self.pixels)


def datasets_on_disk() -> list[SemSegDataset]:
    """Returns the data sets whose folders exist, without the built-in one: asking would draw it."""
    return [
        dataset
        for dataset in DATASETS
        if dataset.root is datasets_root and choose_dirs(dataset, dataset.root())
    ]


def survey(dataset: SemSegDataset, pixels: bool = True) -> Survey:
    """Returns the `Survey` of a data set, compared with its published numbers.

    Reads all of its files; without ``pixels`` only names and headers, which is quick.
    """
    found = Survey(dataset, np.zeros(len(dataset.classes) + 1, dtype=np.int64))
    try:
        dicts = load_pairs(dataset)
    except DatasetError as error:
        found.problems.append(str(error))
        return found
    found.pairs = len(dicts)
    found.sizes = Counter((item["width"], item["height"]) for item in dicts)
    if dataset.published is not None:
        found.problems += _file_differences(found, dataset.published)
    if pixels:
        counts, problem = read_pairs(dataset, dicts)
        found.pixels = counts.sum(axis=0)
        problems, warnings = ([problem], []) if problem else judge(dataset, dicts, counts)
        found.problems += problems
        found.warnings += warnings
    return found


def _file_differences(found: Survey, published: Published) -> list[str]:
    """Compares with the published number of pairs and sizes."""
    name, problems = found.dataset.name, []
    if found.pairs != published.pairs:
        remedy = (
            "Download and unpack what is missing."
            if found.pairs < published.pairs
            else "Remove the files that came from another split or data set."
        )
        problems.append(
            f"{name}: {found.pairs} pairs, {published.pairs} are published. {remedy} {_REMEDY}"
        )
    others = {size: n for size, n in found.sizes.items() if size not in published.sizes}
    if published.sizes and others:
        problems.append(
            f"{name}: {sum(others.values())} pairs have {_format_sizes(others)} pixels, published "
            f"are {_format_sizes(dict.fromkeys(published.sizes))}. Use the files at the size in "
            "which they are published: the tests resize by themselves."
        )
    return problems


def _format_sizes(sizes: Mapping[tuple[int, int], int | None]) -> str:
    """Writes the most frequent sizes, and how many others there are."""
    shown = [
        f"{width}x{height}" + (f" ({count})" if count is not None and len(sizes) > 1 else "")
        for (width, height), count in sorted(sizes.items(), key=lambda s: (-(s[1] or 0), s[0]))
    ]
    return first_names(shown, 2) if shown else ""


def format_surveys(surveys: Sequence[Survey]) -> str:
    """Formats numbers, sizes and classes as tables, followed by all problems and warnings."""
    head = ["data set", "pairs", "published", "width x height", "ignored %", "never labelled"]
    numbers = [
        [
            found.dataset.name,
            found.pairs,
            found.dataset.published.pairs if found.dataset.published else None,
            _format_sizes(found.sizes) or None,
            found.ignored(),
            (", ".join(found.absent()) or "none") if found.pixels.any() else None,
        ]
        for found in surveys
    ]
    parts = [tabulate(numbers, head, floatfmt=".1f", missingval="-")]

    read = [found for found in surveys if found.pixels.any()]
    parts += [_class_table(read[i : i + _COLUMNS]) for i in range(0, len(read), _COLUMNS)]
    problems = [problem for found in surveys for problem in found.problems]
    parts += [f"Problem: {problem}" for problem in problems] or ["No problem found."]
    parts += [f"Warning: {warning}" for found in surveys for warning in found.warnings]
    return "\n\n".join(parts)


def _class_table(surveys: Sequence[Survey]) -> str:
    """Formats percentages side by side; "-" where a data set lacks a class."""
    shares = [found.shares() for found in surveys]
    classes = dict.fromkeys(name for found in surveys for name in found.dataset.classes)
    return tabulate(
        [[name, *(share.get(name) for share in shares)] for name in classes],
        ["% of labelled pixels", *(found.dataset.name for found in surveys)],
        floatfmt=".3f",
        missingval="-",
    )
