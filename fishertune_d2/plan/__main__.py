"""Prints what a config costs: ``python -m fishertune_d2.plan --config-file FILE [KEY VALUE ...]``.

It counts parameters, FLOPs, memory and files, stage by stage, from the config alone. It needs no
weights, data or GPU. With ``--memory-gb N`` it exits with 1 if a stage does not fit a card of N GB.
With ``--card NAME`` or ``--tflops RATE`` it also says the hours of a run.
"""

import argparse
import sys
from collections.abc import Sequence

from fishertune_d2.command_line import add_import_option, ending_in_a_sentence, import_files
from fishertune_d2.config import read_config

from .costs import make_plan
from .rates import add_rate_options, card_notes, read_rates
from .text import format_fit, format_hours, format_plan, summary


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: command-line arguments; None for those of the process.

    Returns:
        0, or 1 if a stage does not fit. The process exits with 2 if the config is wrong.
    """
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.plan",
        description="Prints what a config costs: parameters, FLOPs, memory, files.",
    )
    parser.add_argument("--config-file", required=True, metavar="FILE")
    parser.add_argument("--memory-gb", type=float, metavar="N", help="memory of the card to fit")
    add_rate_options(parser)
    add_import_option(parser)
    parser.add_argument("opts", nargs="*", metavar="KEY VALUE", help="keys of the config to change")
    options = parser.parse_args(arguments)
    with ending_in_a_sentence(code=2):
        import_files(options.imports)
        rates = read_rates(options)
        plan = make_plan(read_config(options.config_file, options.opts))
    parts = [format_plan(plan)]
    if rates:
        parts.append("\n".join([format_hours(plan, rates), *card_notes(options.card)]))
    print(*parts, summary(plan), sep="\n\n")
    if options.memory_gb is None:
        return 0
    fits, words = format_fit(plan, options.memory_gb)
    print(words)
    return 0 if fits else 1


if __name__ == "__main__":
    sys.exit(main())
