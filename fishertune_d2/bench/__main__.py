"""Runs the cells of a table, and writes it: ``python -m fishertune_d2.bench TABLE``.

    python -m fishertune_d2.bench table1 --profile camvid --search
    python -m fishertune_d2.bench table1 --profile camvid --seeds 42 43 44
    python -m fishertune_d2.bench table1 --profile camvid --seeds 42 43 44 --test
    python -m fishertune_d2.bench sweep TUNING.D_MAX 0.01 0.05 0.2 --profile camvid

The first command chooses a learning rate for each entry, the second trains all seeds, and the third
scores them on the test sets. Repeat a command to resume it. See docs/bench.md.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fishertune_d2.analysis.study import split_place
from fishertune_d2.command_line import (
    add_import_option,
    ending_in_a_sentence,
    import_arguments,
    import_files,
)
from fishertune_d2.config import require_choice
from fishertune_d2.modeling.vfm_table import VFMS
from fishertune_d2.plan.rates import add_rate_options, card_notes, read_rates
from fishertune_d2.tuning import TUNING_REGISTRY

from .cells import file_name, sweep_entries
from .hours import format_hours
from .launch import Local, Submitit
from .request import Request
from .runner import Runner
from .tables import PROFILES, RATE, TABLES, Entry, Table, entry_names, find_entry
from .tasks import Search, Test, Train

_TRAIN = (sys.executable, "-m", "fishertune_d2.train")


def main(arguments: Sequence[str] | None = None, train: Sequence[str] = _TRAIN) -> int:
    """Runs the command.

    Args:
        arguments: The command line; None uses the process's own.
        train: The command that trains a cell, without arguments.

    Returns:
        0, or 1 if a cell failed. The process exits with 2 if the command is wrong.
    """
    args = _parser().parse_args(arguments)
    with ending_in_a_sentence(code=2):
        import_files(args.imports)
        _require_sense(args)
        task = _find_task(args)
        if args.dry_run:
            print(task.describe())
            if rates := read_rates(args):
                cells = [c for c in task.cells if c.results(task.sets, task.folder) is None]
                hours = format_hours(cells, task.sets, rates, trained=args.test)
                print("", hours, *card_notes(args.card), sep="\n")
            return 0
        task.require_rates()
        done = True
        if not args.report:
            task.require_ready()
            launcher: Local | Submitit = Local(args.jobs)
            if args.submitit is not None:
                launcher = Submitit(task.request.output / "submitit", args.submitit)
            command = [*train, *import_arguments(args.imports)]
            done = Runner(launcher, command).run(task.cells, task.sets, task.folder)
        task.conclude()
        if args.save:
            task.save(args.save)
        return 0 if done else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.bench",
        description="Trains, searches, tests or reports the cells of a table: each entry with each "
        "foundation model and seed.",
        epilog="See docs/bench.md.",
    )
    parser.add_argument("table", choices=[*TABLES, "sweep"])
    parser.add_argument("values", nargs="*", help="KEY VALUE ... of a sweep")
    parser.add_argument("--profile", choices=list(PROFILES), default="paper", help="the setting")
    parser.add_argument(
        "--vfm",
        nargs="+",
        metavar="VFM",
        help="foundation models; default: the profile's or the table's",
    )
    parser.add_argument(
        "--methods", nargs="+", metavar="METHOD", help="entries or methods; default: the table's"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument(
        "--output",
        type=Path,
        help="the folder of the cells, or with --report a study's table; default: "
        "outputs/bench/PROFILE",
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY VALUE", help="keys of every cell's config"
    )
    add_import_option(parser)
    parser.add_argument(
        "--save", type=Path, metavar="FILE.jsonl", help="add the finished runs to a study's table"
    )
    task = parser.add_argument_group("tasks (default: train)").add_mutually_exclusive_group()
    task.add_argument(
        "--search",
        nargs="*",
        type=float,
        metavar="RATE",
        help="search: train each entry with several learning rates and the first seed; choose the "
        "best on the dev sets",
    )
    task.add_argument(
        "--test", action="store_true", help="test: score the trained cells on the test sets"
    )
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--dry-run", action="store_true", help="print the cells and their commands")
    only.add_argument(
        "--report", action="store_true", help="run nothing; write the table of the finished cells"
    )
    add_rate_options(parser)
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--jobs", type=int, default=1, metavar="N", help="run N cells at a time")
    where.add_argument(
        "--submitit",
        nargs="*",
        metavar="NAME=VALUE",
        help="run on SLURM, with parameters of submitit's AutoExecutor",
    )
    return parser


def _require_sense(args: argparse.Namespace) -> None:
    """Refuses options that contradict each other."""
    if args.jobs < 1:
        raise ValueError(f"--jobs {args.jobs}: at least 1")
    if read_rates(args) and not args.dry_run:
        raise ValueError("--card and --tflops say the hours of a dry run: add --dry-run")
    if len(args.set) % 2:
        raise ValueError(f"--set takes keys and values in turn: got {len(args.set)} words")
    if args.save and args.save.suffix != ".jsonl":
        raise ValueError(f"--save {args.save}: name a table of runs, FILE.jsonl")
    if args.output and split_place(args.output):
        if args.save:
            raise ValueError("--save adds the runs of a folder: --output names a table of runs")
        if not (args.report or args.dry_run):
            raise ValueError(
                f"--output {args.output} is a table of runs: add --report, or name a folder"
            )


def _find_task(args: argparse.Namespace) -> Train:
    table, profile = _find_table(args), PROFILES[args.profile]
    for vfm in args.vfm or ():  # not by the parser, which knows no VFM of an imported file
        require_choice("--vfm", vfm, VFMS)
    request = Request(
        name=f"sweep_{file_name(args.values[0])}" if args.values else args.table,
        table=table,
        profile_name=args.profile,
        entries=[find_entry(name) for name in args.methods or table.entries],
        vfms=list(args.vfm or profile.vfms or table.vfms),
        seeds=args.seeds,
        output=(args.output or Path("outputs/bench") / args.profile).resolve(),
        options=args.set,
        imports=args.imports,
    )
    _require_registered(request.entries)
    if args.values:
        key, *values = args.values
        request = replace(request, entries=sweep_entries(request, key, values))
    if args.test:
        return Test(request)
    if args.search is None:
        return Train(request)
    return Search(request, args.search, again=args.report)


def _find_table(args: argparse.Namespace) -> Table:
    if args.table == "sweep":
        if len(args.values) < 2:
            raise ValueError("write a sweep as: sweep KEY VALUE ...")
        key = args.values[0]  # FisherTune with one key changed, as in appendices C and E
        return Table(f"FisherTune by {key}", entries=("fishertune",), search=key != RATE)
    if args.values:
        raise ValueError(f"{args.table} takes no values: {' '.join(args.values)}")
    return TABLES[args.table]


def _require_registered(entries: Sequence[Entry]) -> None:
    registered = {name for name, _ in TUNING_REGISTRY}
    unknown = [entry.name for entry in entries if entry.method not in registered]
    if unknown:
        raise KeyError(
            f"no tuning method for {', '.join(unknown)}; there are {', '.join(entry_names())}"
        )


if __name__ == "__main__":
    sys.exit(main())
