"""Prints what a config costs: ``python -m fishertune_d2.plan --config-file FILE [KEY VALUE ...]``.

Parameters, FLOPs, memory and files, stage by stage, from the config alone: no weights, data or GPU
are needed. With ``--memory-gb N`` it exits with 1 if a stage does not fit a card of N GB.
"""

import argparse
import sys
from collections.abc import Sequence

from yaml import YAMLError

from fishertune_d2.config import read_config

from .plan import make_plan
from .report import format_fit, format_plan, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        0, or 1 if a stage does not fit.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.plan",
        description="Prints what a config costs: parameters, FLOPs, memory, files.",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--memory-gb", type=float, metavar="N", help="memory of the card to fit")
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the config to change")
    options = parser.parse_args(arguments)
    try:
        cfg = read_config(options.config_file, options.opts)
    except (AssertionError, KeyError, OSError, ValueError, YAMLError) as error:
        parser.error(f"the config cannot be read: {_words(error)}")
    try:
        plan = make_plan(cfg)
    except (KeyError, ValueError) as error:
        parser.error(f"the config cannot be planned: {_words(error)}")
    print(format_plan(plan), summary(plan), sep="\n\n")
    if options.memory_gb is None:
        return 0
    fits, words = format_fit(plan, options.memory_gb)
    print(words)
    return 0 if fits else 1


def _words(error: Exception) -> str:
    # A KeyError's text is in quotation marks.
    return str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)


if __name__ == "__main__":
    sys.exit(main())
