"""Writes one self-contained HTML page about a run.

python -m fishertune_d2.report OUTPUT_DIR [--output FILE]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fishertune_d2.compat import require_detectron2

require_detectron2()

from fishertune_d2.analysis.page import write_report  # noqa: E402
from fishertune_d2.command_line import ending_in_a_sentence  # noqa: E402
from fishertune_d2.run import Run, RunError  # noqa: E402

__all__ = ["Run", "RunError", "write_report"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command, with the process's own arguments by default."""
    parser = argparse.ArgumentParser(
        prog="python -m fishertune_d2.report", description=__doc__.splitlines()[0]
    )
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of a run, finished or not")
    parser.add_argument("--output", type=Path, help="default: report.html in OUTPUT_DIR")
    options = parser.parse_args(arguments)
    page = options.output or options.output_dir / "report.html"
    with ending_in_a_sentence():
        write_report(Run(options.output_dir), page)
    print(f"{page}: {page.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
