"""Checks data sets: ``python -m fishertune_d2.data.check NAME ...`` or ``--all``.

Reads every file. Prints the number of pairs, the sizes of images and the share of each class beside
the published numbers, then all problems with their remedies, then warnings. Exits with 1 if there
is a problem. The check before training does not read files again that pass here.
"""

import argparse
import sys
from collections.abc import Sequence

from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.data.check.survey import datasets_on_disk, format_surveys, survey
from fishertune_d2.data.dataset_description import datasets_root
from fishertune_d2.data.dataset_table import DATASETS


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if nothing is wrong, else 1; exits with 2 if a folder cannot be read."""
    known = {dataset.name: dataset for dataset in DATASETS}
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.data.check",
        description="Compares data sets on disk with their published numbers.",
        epilog=f"Data sets: {', '.join(known)}.",
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="data sets to check")
    parser.add_argument(
        "--all", action="store_true", help="check every data set on disk, except the built-in one"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in known]
    if unknown:
        parser.error(f"no data set {unknown[0]!r}; choose from {', '.join(known)}")
    chosen = {name: known[name] for name in options.names}
    if options.all:
        chosen |= {dataset.name: dataset for dataset in datasets_on_disk()}
    if not chosen:
        where = datasets_root().absolute()
        parser.error(
            f"no data set below {where}: set DETECTRON2_DATASETS to the folder that holds them"
            if options.all
            else "name a data set, or use --all"
        )
    with ending_in_a_sentence(code=2):
        surveys = [survey(dataset) for dataset in chosen.values()]
    print(format_surveys(surveys))
    return int(any(found.problems for found in surveys))


if __name__ == "__main__":
    sys.exit(main())
