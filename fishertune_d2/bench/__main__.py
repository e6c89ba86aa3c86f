"""Runs the cells of a table, and writes it: ``python -m fishertune_d2.bench TABLE``.

    python -m fishertune_d2.bench table1 --profile camvid --search
    python -m fishertune_d2.bench table1 --profile camvid --seeds 42 43 44
    python -m fishertune_d2.bench table1 --profile camvid --seeds 42 43 44 --test
    python -m fishertune_d2.bench sweep TUNING.D_MAX 0.01 0.05 0.2 --profile camvid

The first chooses a learning rate for each row, the third looks at the test sets. Each goes on
where it was stopped. What it does, what lies where: docs/bench.md.
"""

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path

from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.data import DatasetError, load_datasets
from fishertune_d2.modeling.vfm_table import VFMS
from fishertune_d2.tuning import TUNING_REGISTRY

from .cells import Cell, file_name, make_cells, needs_rate, sweep_rows
from .choices import TEST, describe, read_choices, require_unseen, write_choices
from .launch import Local, Submitit
from .report import paper_numbers, read_lines, write_report
from .runner import Runner, require_same_recipe
from .tables import (
    FREEZE,
    PROFILES,
    RATE,
    TABLES,
    Profile,
    Row,
    Table,
    find_row,
    rows_of_registry,
    sweep,
)


def main(arguments: Sequence[str] | None = None, train: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: of the command line; None takes the process's own.
        train: the command that trains a cell; None for fishertune_d2.train.

    Returns:
        0, or 1 if a cell failed. The process leaves with 2 if the command is wrong.
    """
    args = _parser().parse_args(arguments)
    with ending_in_a_sentence(code=2):
        bench = _Bench(args)
        if args.dry_run:
            print(bench.describe())
            return 0
        if args.report:
            bench.conclude()
            return 0
        return bench.run(train)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.bench",
        description="Runs the cells of a table (row x foundation model x seed), and writes it.",
        epilog="See docs/bench.md.",
    )
    parser.add_argument("table", choices=[*TABLES, "sweep"])
    parser.add_argument("values", nargs="*", help="of a sweep: KEY VALUE ...")
    parser.add_argument("--profile", choices=list(PROFILES), default="paper")
    parser.add_argument(
        "--vfm",
        nargs="+",
        choices=list(VFMS),
        metavar="VFM",
        help="foundation models; default: the profile's or the table's",
    )
    parser.add_argument("--methods", nargs="+", metavar="ROW", help="rows, or names of methods")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output", type=Path, help="default: outputs/bench/PROFILE")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY VALUE", help="in every config")
    stage = parser.add_mutually_exclusive_group()
    stage.add_argument(
        "--search",
        nargs="*",
        type=float,
        metavar="RATE",
        help="choose a learning rate for each row, with the first seed, on the dev sets",
    )
    stage.add_argument("--test", action="store_true", help="score what is trained on the test sets")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="say what would be run")
    only.add_argument(
        "--report", action="store_true", help="run nothing; write the table of what is finished"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, metavar="N", help="cells at a time")
    where.add_argument(
        "--submitit", nargs="*", metavar="NAME=VALUE", help="SLURM, with what AutoExecutor takes"
    )
    return parser


class _Bench:
    """One call of the command: its cells, and the data sets to score them on.

    Args:
        args: of the command line. If cells are to run, data and earlier runs are looked at.
    """

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.profile: Profile = PROFILES[args.profile]
        self.table = _find_table(args)
        self.source = self.table.source if "{source}" in self.profile.base else ""
        self.vfms = list(args.vfm or self.profile.vfms or self.table.vfms)
        self.rows = self._find_rows()
        self.output = (args.output or Path("outputs/bench") / args.profile).resolve()
        self.name = "_".join(["sweep", file_name(args.values[0])] if args.values else [args.table])
        fixed = not self.table.search or RATE in args.set
        self.searches = bool(self.profile.rates) and not fixed
        self._require_sense()
        searching = args.search is not None
        self.cells = self._cells_of_search() if searching else self._cells_of_rows()
        if args.test:
            self.shown = {f"{self.name}_{end}": sets for end, sets in self.profile.test.items()}
        else:
            self.shown = {self.name: self.profile.dev or self.table.test}
        self.sets = list(chain(*self.shown.values()))
        self.folder = TEST if args.test else "dev" if self.profile.dev else args.table
        if args.dry_run or args.report:
            return
        require_same_recipe(self.cells)
        if searching:
            self._require_unseen()
        if args.test:
            self._require_trained()
        self._require_data()
        if args.submitit is None:
            self.launcher = Local(args.jobs)
        else:
            self.launcher = Submitit(self.output / "submitit", args.submitit)

    def run(self, train: Sequence[str] | None) -> int:
        """Runs the cells, then concludes; returns 0, or 1 if a cell failed."""
        runner = Runner(self.launcher, train) if train else Runner(self.launcher)
        run = runner.score if self.args.test else runner.train
        done = run(self.cells, self.sets, self.folder)
        self.conclude()
        return 0 if done else 1

    def conclude(self) -> None:
        """Chooses, or writes the table, from what is finished."""
        if self.args.search is not None:
            self._choose()
        else:
            self._report()

    def describe(self) -> str:
        """The cells, their commands, and what they share."""
        lines, test = [], self.args.test
        for cell in self.cells:
            done = "  (done before)" if cell.results(self.sets, self.folder) else ""
            arguments = (
                cell.score_arguments(self.sets, cell.folder / self.folder)
                if test
                else cell.arguments(self.sets)
            )
            lines.append(f"{cell.folder}{done}")
            lines.append(f"  {shlex.join(['python', '-m', 'fishertune_d2.train', *arguments])}")
            if not test:
                lines += [f"  makes the {w.words}: {cell.shared[w]}" for w in cell.makes]
                lines += [f"  takes the {w.words}: {path}" for w, path in cell.takes.items()]
        return "\n".join([*lines, f"{len(self.cells)} cells"])

    def _require_sense(self) -> None:
        """Refuses options that do not go together."""
        args = self.args
        if args.jobs < 1:
            raise ValueError(f"--jobs {args.jobs}: at least 1")
        if len(args.set) % 2:
            raise ValueError(f"--set takes keys and values in turn: got {len(args.set)} words")
        if (args.search is not None or args.test) and not self.profile.dev:
            raise ValueError(
                f"the profile {args.profile} has no dev sets to choose on: its runs take the "
                "learning rates of its configs, and are scored on the test sets when they end"
            )
        if args.search is not None and not self.searches:
            raise ValueError(f"{args.table} has no search: its learning rates are given")

    def _find_rows(self) -> list[Row]:
        """The rows that are asked for.

        Raises:
            KeyError: if a row is unknown, or its method is not registered.
        """
        rows = [find_row(name) for name in self.args.methods or self.table.rows]
        registered = {name for name, _ in TUNING_REGISTRY}
        unknown = [row.name for row in rows if row.method not in registered]
        if unknown:
            raise KeyError(
                f"no tuning method for {', '.join(unknown)}; there are "
                f"{', '.join(rows_of_registry())}"
            )
        if self.args.table != "sweep":
            return rows
        key, *values = self.args.values
        where = {"vfm": self.vfms[0], "profile": self.profile, "source": self.source}
        return [swept for row in rows for swept in sweep_rows(row, key, values, **where)]

    def _cells(
        self,
        rows: Sequence[Row],
        seeds: Sequence[int],
        rates: Mapping[tuple[str, str], Sequence[float]],
    ) -> list[Cell]:
        return make_cells(
            rows,
            self.vfms,
            seeds,
            profile=self.profile,
            source=self.source,
            output=self.output,
            rates=rates,
            options=self.args.set,
        )

    def _place(self, vfm: str) -> Path:
        return self.output / self.source / vfm

    def _cells_of_search(self) -> list[Cell]:
        names = list(dict.fromkeys(row.rate_of for row in self.rows if needs_rate(row)))
        rates = {}
        for vfm in self.vfms:
            before = read_choices(self._place(vfm)) if self.args.report else {}
            for name in names:
                tried = [float(rate) for rate in before.get(name, {}).get("mIoU", ())]
                rates[vfm, name] = self.args.search or tried or self.profile.rates
        frozen = [row for row in self.rows if row.method == FREEZE]  # for its warm-up
        rows = [*frozen, *map(find_row, names)]
        return self._cells(rows, self.args.seeds[:1], rates)

    def _cells_of_rows(self) -> list[Cell]:
        rates, still_open = {}, []
        for vfm in self.vfms if self.searches else ():
            choices = read_choices(self._place(vfm))
            for row in filter(needs_rate, self.rows):
                if row.rate_of in choices:
                    rates[vfm, row.rate_of] = [choices[row.rate_of]["rate"]]
                else:
                    still_open.append(f"{row.rate_of} on {vfm}")
        if still_open:
            raise ValueError(
                "the learning rate is not chosen yet for "
                f"{', '.join(dict.fromkeys(still_open))}: run the same with --search first"
            )
        return self._cells(self.rows, self.args.seeds, rates)

    def _require_unseen(self) -> None:
        searched = list(dict.fromkeys(c.row.name for c in self.cells if c.rate is not None))
        for vfm in self.vfms:
            require_unseen(self._place(vfm), searched)

    def _require_trained(self) -> None:
        untrained = [str(cell.folder) for cell in self.cells if not cell.weights.is_file()]
        if untrained:
            raise ValueError(
                "not trained yet; run the same without --test first:\n  " + "\n  ".join(untrained)
            )

    def _require_data(self) -> None:
        trained = [name for cell in self.cells for name in cell.recipe["DATASETS.TRAIN"]]
        troubles = []
        for name in dict.fromkeys([*trained, *self.sets]):
            try:
                load_datasets([name])
            except (DatasetError, KeyError) as error:
                troubles.append(str(error.args[0]))
        if troubles:
            raise DatasetError("data are missing:\n" + "\n\n".join(troubles))

    def _choose(self) -> None:
        for vfm in self.vfms:
            place = self._place(vfm)
            of_vfm = [cell for cell in self.cells if cell.vfm == vfm and cell.rate is not None]
            choices = write_choices(place, of_vfm, self.profile.dev)
            print(f"{place / 'choices.json'}")
            for row in dict.fromkeys(cell.row.name for cell in of_vfm):
                print(describe(row, choices[row]) if row in choices else f"{row}: still open")

    def _report(self) -> None:
        finished = [cell for cell in self.cells if cell.results(self.sets, self.folder)]
        if not finished:
            print("no cell is finished: there is no table yet", file=sys.stderr)
            return
        own = self.args.profile == "paper" and not self.args.set
        for name, sets in self.shown.items():
            path = self.output / name
            text = write_report(
                self.table.title,
                read_lines(finished, sets, self.folder),
                path,
                paper=paper_numbers(self.table.paper) if own else {},
                missing=len(self.cells) - len(finished),
                averages=self.table.averages,
            )
            print(text)
            print(f"{path}.csv, .md, .png", file=sys.stderr)


def _find_table(args: argparse.Namespace) -> Table:
    """The table that is asked for.

    Raises:
        ValueError: if a sweep has no values, or another table has some.
    """
    if args.table == "sweep":
        if len(args.values) < 2:
            raise ValueError("write a sweep as: sweep KEY VALUE ...")
        return sweep(args.values[0])
    if args.values:
        raise ValueError(f"{args.table} takes no values: {' '.join(args.values)}")
    return TABLES[args.table]


if __name__ == "__main__":
    sys.exit(main())
