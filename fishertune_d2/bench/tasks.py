"""The tasks of a table: train its cells, search their learning rates, or test the trained cells.

Each task makes its cells, checks that they can run, runs them, and concludes with the table of the
finished cells or with the chosen learning rates.
"""

import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

from fishertune_d2.analysis.study import TEST, StudyRun, save_runs, split_place
from fishertune_d2.command_line import import_arguments
from fishertune_d2.data import DatasetError, load_datasets
from fishertune_d2.run import Results, Run

from .cells import DEV, Cell, digest, make_cells, needs_rate
from .learning_rates import describe, read_choices, require_same_search, write_choices
from .request import Request
from .result_table import paper_numbers, read_lines, write_table
from .runner import require_same_recipe
from .tables import FREEZE, find_entry


class Train:
    """Trains the cells with their chosen learning rates, and scores them on the dev sets.

    Args:
        request: The table.

    Attributes:
        open: The cells without a chosen learning rate, by (vfm, ``Entry.rate_of``).
    """

    folder = DEV

    def __init__(self, request: Request):
        self.request = request
        if not request.profile.dev:
            self.folder = request.name  # the test sets of this table
        self.shown = self._shown()
        self.sets = list(chain(*self.shown.values()))
        self.open: list[tuple[str, str]] = []
        self.cells = self._cells()

    def _shown(self) -> dict[str, Sequence[str]]:
        """The data sets of each table to write, by its name."""
        return {self.request.name: self.request.profile.dev or self.request.table.test}

    def _cells(self) -> list[Cell]:
        request = self.request
        rates = {}
        for vfm in request.vfms if request.searches else ():
            choices = read_choices(request.place(vfm))
            for entry in filter(needs_rate, request.entries):
                if entry.rate_of in choices:
                    rates[vfm, entry.rate_of] = [choices[entry.rate_of]["rate"]]
                elif request.profile.dev:  # otherwise the configs give a rate
                    self.open.append((vfm, entry.rate_of))
        return make_cells(request, rates)

    def require_rates(self) -> None:
        """Refuses cells without a chosen learning rate.

        Raises:
            ValueError: There are some; the message names their entries.
        """
        names = dict.fromkeys(f"{name} on {vfm}" for vfm, name in self.open)
        if names:
            raise ValueError(
                f"the learning rate is not chosen yet for {', '.join(names)}: run the same with "
                "--search first"
            )

    def require_ready(self) -> None:
        """Checks the folders of the cells and the data sets.

        Cells whose folders hold a run of another recipe raise a ValueError.

        Raises:
            DatasetError: Data sets are missing; the message names all of them.
        """
        require_same_recipe(self.cells)
        trained = [name for cell in self.cells for name in cell.recipe["DATASETS.TRAIN"]]
        troubles = []
        for name in dict.fromkeys([*trained, *self.sets]):
            try:
                load_datasets([name])
            except (DatasetError, KeyError) as error:
                troubles.append(str(error.args[0]))
        if troubles:
            raise DatasetError("data are missing:\n" + "\n\n".join(troubles))

    def conclude(self) -> None:
        """Writes the table of the finished cells."""
        request, finished = self.request, self.finished()
        if not finished:
            print("no cell is finished: there is no table yet", file=sys.stderr)
            return
        folder = request.output
        if split_place(folder):
            folder = folder.with_suffix("")  # the tables about a study's table go beside it
        folder.mkdir(parents=True, exist_ok=True)
        compared = request.profile_name == "paper" and not request.options
        for name, sets in self.shown.items():
            path = folder / name
            text = write_table(
                request.table.title,
                read_lines(finished, sets),
                path,
                paper=paper_numbers(request.table.paper) if compared else {},
                missing=len(self.cells) - len(finished),
                averages=request.table.averages,
            )
            print(text)
            print(f"{path}.csv, .md, .png", file=sys.stderr)

    def finished(self) -> list[tuple[Cell, Results]]:
        """Returns the cells that are scored, with their scores."""
        found = [(cell, cell.results(self.sets, self.folder)) for cell in self.cells]
        return [(cell, results) for cell, results in found if results is not None]

    def save(self, table: Path) -> None:
        """Adds the finished cells to a study's table."""
        runs = []
        for cell, results in self.finished():
            file = Path(results.place)
            record = file.with_name("cell.json")
            known = json.loads(record.read_text()) if record.is_file() else {}
            runs.append(
                StudyRun(
                    run=file.parent.relative_to(self.request.output).as_posix(),
                    entry=cell.entry.name,
                    vfm=cell.vfm,
                    train=tuple(cell.recipe["DATASETS.TRAIN"]),
                    seed=cell.seed,
                    rate=cell.rate,
                    config=digest(known["recipe"]) if known else None,
                    seconds=known.get("seconds"),
                    content=json.loads(file.read_text()) | _curves(file.parent),
                )
            )
        save_runs(table, runs)
        print(f"{len(runs)} runs saved to {table}", file=sys.stderr)

    def describe(self) -> str:
        """Returns the cells, their commands, and the files that they share.

        A cell whose learning rate is open has none of these commands yet.
        """
        start = ["python", "-m", "fishertune_d2.train", *import_arguments(self.request.imports)]
        lines = []
        for cell in self.cells:
            if needs_rate(cell.entry) and (cell.vfm, cell.entry.rate_of) in self.open:
                lines += [str(cell.folder), "  rate: open, until --search has chosen it"]
            else:
                done = "  (done before)" if cell.results(self.sets, self.folder) else ""
                command = shlex.join([*start, *self._arguments(cell)])
                lines += [f"{cell.folder}{done}", f"  {command}"]
            lines += [f"  makes the {what.words}: {cell.shared[what]}" for what in cell.makes]
            lines += [f"  takes the {what.words}: {path}" for what, path in cell.takes.items()]
        return "\n".join([*lines, f"{len(self.cells)} cells"])

    def _arguments(self, cell: Cell) -> list[str]:
        return cell.arguments(self.sets)


def _curves(folder: Path) -> dict[str, Any]:
    """Returns the scores by iterations done, if a training was scored before its end."""
    series = Run(folder).score_series()
    if all(len(each) < 2 for each in series.values()):
        return {}
    return {"curves": series}


class Search(Train):
    """Trains each entry with several learning rates and one seed, and chooses the best.

    Args:
        request: The table. A ValueError says if it has no search.
        rates: The values to try; by default those that were tried before if ``again``, else the
            profile's.
        again: Whether to report a search that has run.
    """

    def __init__(self, request: Request, rates: Sequence[float], again: bool):
        if not request.searches:
            raise ValueError(f"{request.name} has no search: its learning rates are given")
        self.rates, self.again = rates, again
        super().__init__(request)
        self.folder = DEV

    def _cells(self) -> list[Cell]:
        request = self.request
        names = list(dict.fromkeys(e.rate_of for e in request.entries if needs_rate(e)))
        rates = {}
        for vfm in request.vfms:
            before = read_choices(request.place(vfm)) if self.again else {}
            for name in names:
                tried = [float(rate) for rate in before[name]["mIoU"]] if name in before else []
                rates[vfm, name] = self.rates or tried or request.profile.rates
        frozen = [entry for entry in request.entries if entry.method == FREEZE]  # for its warm-up
        return make_cells(request.of_search(), rates, [*frozen, *map(find_entry, names)])

    def _shown(self) -> dict[str, Sequence[str]]:
        return {self.request.name: self.request.dev}

    def require_ready(self) -> None:
        """Also refuses entries that were scored on the test sets, or searched in another way.

        Raises:
            ValueError: Some entries were; the message names them.
        """
        super().require_ready()
        for vfm in self.request.vfms:
            require_same_search(self.request.place(vfm), self._tried(vfm), self.request.dev)
        searched = list(dict.fromkeys(c.entry.name for c in self.cells if c.rate is not None))
        # Without dev sets of the profile, a run with a chosen rate is scored on test sets at once.
        scored = f"{TEST}/results.json" if self.request.profile.dev else "results.json"
        for place in map(self.request.place, self.request.vfms):
            seen = [n for n in searched if any(place.glob(f"{n}@rate=*/{scored}"))]
            if seen:
                raise ValueError(
                    f"{', '.join(seen)} in {place}: the test sets were scored with the chosen "
                    "learning rates, which stand. For a new search, name another --output"
                )

    def conclude(self) -> None:
        """Chooses the learning rates, and prints them."""
        for vfm in self.request.vfms:
            place, tried = self.request.place(vfm), self._tried(vfm)
            if split_place(place) is None:
                choices = write_choices(place, tried, self.request.dev)
                print(place / "choices.json")
            else:
                choices = read_choices(place)
            for name in dict.fromkeys(cell.entry.name for cell in tried):
                print(describe(name, choices[name]) if name in choices else f"{name}: still open")

    def _tried(self, vfm: str) -> list[Cell]:
        """The cells of a foundation model with the rates to try, without the frozen one."""
        return [cell for cell in self.cells if cell.vfm == vfm and cell.rate is not None]


class Test(Train):
    """Scores the trained cells on the test sets, once."""

    folder = TEST

    def __init__(self, request: Request):
        if not request.profile.dev:
            raise ValueError(
                f"--test is for a profile with dev sets: the runs of the profile "
                f"{request.profile_name} are scored on the test sets when they end"
            )
        super().__init__(request)

    def _shown(self) -> dict[str, Sequence[str]]:
        sets = self.request.profile.test
        return {f"{self.request.name}_{suffix}": sets[suffix] for suffix in sets}

    def _cells(self) -> list[Cell]:
        # Trained cells need no shared files.
        return [replace(cell, shared={}, makes=frozenset()) for cell in super()._cells()]

    def require_ready(self) -> None:
        """Also refuses cells that are not trained.

        Raises:
            ValueError: Cells are not trained; the message names their folders.
        """
        super().require_ready()
        untrained = [str(cell.folder) for cell in self.cells if not cell.weights.is_file()]
        if untrained:
            raise ValueError(
                "not trained yet; run the same without --test first:\n  " + "\n  ".join(untrained)
            )

    def _arguments(self, cell: Cell) -> list[str]:
        return cell.score_arguments(self.sets, cell.folder / self.folder)
