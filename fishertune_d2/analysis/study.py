"""Reads the runs of a study, from a folder of runs or from the study's table.

A table such as ``docs/results/selection.jsonl`` keeps the scores of runs whose folders are gone. It
has one JSON line for each ``results.json``, with its whole content. Runs have paths as if the table
were the folder of the study: ``docs/results/selection.jsonl/dinov2_vits/freeze_42/test``.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from fishertune_d2.files import whole_file
from fishertune_d2.run import Results, Run, RunError

TEST = "test"  # the folder below a run's own for its scores on the test sets
SEARCH = "search"  # the folder of a search's runs that train in another way than the study's


@dataclass(frozen=True)
class StudyRun:
    """One line of a study's table."""

    run: str  # the path below the study's folder, such as dinov2_vits/full@rate=0.3_43/test
    entry: str  # the method with its options, as the bench calls it
    vfm: str
    train: tuple[str, ...]  # the data sets of the training
    seed: int
    rate: float | None  # the backbone's learning rate as a share of BASE_LR, if it was searched
    config: str | None  # a digest of the keys that define the run; None if not recorded
    # The wall time of the training, or for scores on the test sets of the scoring alone; None if it
    # was not recorded.
    seconds: float | None
    content: Mapping[str, Any]  # of results.json

    @property
    def tested(self) -> bool:
        """Whether the scores are those on the test sets, made after the training."""
        return Path(self.run).name == TEST

    @property
    def searched(self) -> bool:
        """Whether a search trained the run in another way than the study's other runs."""
        return Path(self.run).parts[0] == SEARCH

    @property
    def folder(self) -> str:
        """The path of the training's folder."""
        return str(Path(self.run).parent) if self.tested else self.run

    def results(self, table: Path) -> Results:
        """Returns the scores; ``table`` names their place in messages."""
        return Results.of(self.content, str(table / self.run))


_COLUMNS = [each.name for each in fields(StudyRun) if each.name != "content"]


def read_table(table: Path) -> list[StudyRun]:
    """Reads a study's table.

    Returns:
        Its runs, in the order of their paths.

    Raises:
        RunError: The file is missing, or is not a table that the bench wrote.
    """
    if not table.is_file():
        raise RunError(f"there is no {table}: write it with fishertune_d2.bench --save {table}")
    found = table.stat()
    return list(_read_runs(table, (found.st_mtime_ns, found.st_size)))


@lru_cache(maxsize=1)
def _read_runs(table: Path, stamp: tuple[int, int]) -> tuple[StudyRun, ...]:
    """Reads a table once, until its ``stamp`` changes: a report asks for each of its runs."""
    runs = []
    for number, text in enumerate(table.read_text(encoding="utf-8").splitlines(), 1):
        try:
            line = json.loads(text)
            columns = {name: line.pop(name) for name in _COLUMNS}
        except (ValueError, KeyError, AttributeError) as error:
            raise RunError(
                f"{table}, line {number}, is no run ({type(error).__name__}: {error}): write the "
                f"table again with fishertune_d2.bench --save {table}"
            ) from error
        columns["train"] = tuple(columns["train"])
        runs.append(StudyRun(**columns, content=line))
    return tuple(runs)


def save_runs(table: Path, runs: Iterable[StudyRun]) -> None:
    """Adds runs to a study's table, which may be new; a run replaces one with the same path."""
    kept = {run.run: run for run in (read_table(table) if table.is_file() else [])}
    kept |= {run.run: run for run in runs}
    lines = [
        json.dumps({name: getattr(kept[path], name) for name in _COLUMNS} | {**kept[path].content})
        for path in sorted(kept)
    ]
    with whole_file(table) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")


def split_place(place: str | Path) -> tuple[Path, str] | None:
    """Splits a path into a study's table and the path in it; None if it names no table."""
    place = Path(place)
    for parent in (place, *place.parents):
        if parent.suffix == ".jsonl":
            return parent, place.relative_to(parent).as_posix()
    return None


def read_results(run: str | Path) -> Results:
    """Reads the scores of a run, by its folder or by its path in a study's table.

    Returns:
        The scores.

    Raises:
        RunError: There are no scores, or the file that should hold them is damaged.
    """
    split = split_place(run)
    if split is None:
        return Results.read(Run(Path(run)).results_file)
    table, path = split
    for found in read_table(table):
        if found.run == path:
            return found.results(table)
    raise RunError(f"{table} has no run {path!r}")


def find_runs(place: str | Path, test: bool = False) -> dict[str, Results]:
    """Finds the finished runs of a study by the paths of their folders, ``<method>_<seed>``.

    Args:
        place: The folder that holds the runs' folders, or a study's table or a folder in it.
        test: Whether to read the scores on the test sets, ``<method>_<seed>/test``.

    Returns:
        The scores of each run, by the path of its folder.
    """
    split = split_place(place)
    if split is None:
        files = sorted(Path(place).glob("*_*/test/results.json" if test else "*_*/results.json"))
        return {str(f.parent.parent if test else f.parent): Results.read(f) for f in files}
    table, below = split
    return {
        str(table / run.folder): run.results(table)
        for run in read_table(table)
        if run.tested == test
        and re.search(r"_\d+$", run.folder)  # not freeze_43/dev, which scores the run again
        and Path(run.run).is_relative_to(below)
    }
