"""Checks data sets by hand: ``python -m fishertune_d2.data.check NAME ...`` or ``--all``.

Reads every file; prints the number of pairs, the sizes of images and the share of each class beside
what is published, then what is wrong and how to mend it. Exits with 1 if something is. What passes
is not read again by the check before training.
"""

import argparse
import sys
from collections.abc import Sequence

from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.data.check.survey import format_surveys, rows_on_disk, survey
from fishertune_d2.data.pairs import datasets_root
from fishertune_d2.data.rows import DATASETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        0 if nothing is wrong, else 1. The process leaves with 2 if a folder cannot be read.
    """
    rows = {row.name: row for row in DATASETS}
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.data.check",
        description="Checks data sets against what is published of them.",
        epilog=f"Data sets: {', '.join(rows)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets to check")
    parser.add_argument(
        "--all", action="store_true", help="every data set that is there, but for the built-in"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in rows]
    if unknown:
        parser.error(f"no data set {unknown[0]!r}; choose from {', '.join(rows)}")
    chosen = {name: rows[name] for name in options.names}
    if options.all:
        chosen |= {row.name: row for row in rows_on_disk()}
    if not chosen:
        where = datasets_root().absolute()
        parser.error(
            f"no data set below {where}: set DETECTRON2_DATASETS to the folder that holds them"
            if options.all
            else "name a data set, or use --all"
        )
    with ending_in_a_sentence(code=2):
        surveys = [survey(row) for row in chosen.values()]
    print(format_surveys(surveys))
    return int(any(found.problems for found in surveys))


if __name__ == "__main__":
    sys.exit(main())
