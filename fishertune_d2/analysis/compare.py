"""One table over several runs, in Markdown.

python -m fishertune_d2.analysis.compare outputs/camvid/freeze outputs/camvid/full ...
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from tabulate import tabulate


def compare(output_dirs: Sequence[str | Path]) -> str:
    """Reads each run's ``results.json`` into a row: what was tuned, mIoU by data set, average.

    Args:
        output_dirs: OUTPUT_DIR of each run; all with the same test sets and the same protocol.

    Returns:
        A Markdown table, and a line with the protocol that the rows share.

    Raises:
        ValueError: if the runs differ in test sets or protocol, which would compare unlike things.
    """
    rows, first = [], None
    for folder in output_dirs:
        results = json.loads((Path(folder) / "results.json").read_text())
        protocol = {k: v for k, v in results["protocol"].items() if k not in ("method", "commit")}
        scores = {**results["source"], **results["targets"]}
        if first is None:
            first = (protocol, list(scores))
        elif first != (protocol, list(scores)):
            raise ValueError(
                f"{folder} was scored by another protocol or on other data than {output_dirs[0]}"
            )
        rows.append(
            [
                results["protocol"]["method"],
                f"{results['tuned_parameters'] / 1e6:.2f} M",
                *(f"{score:.2f}" for score in scores.values()),
                f"{results['target_average']:.2f}",
                results["protocol"]["commit"],
            ]
        )
    protocol, names = first
    headers = ["method", "backbone weights tuned", *names, "average over unseen", "commit"]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    shown = {k: v for k, v in protocol.items() if k not in ("test_size", "classes")}
    return f"{table}\n\nProtocol: " + ", ".join(f"{k} {v}" for k, v in shown.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dirs", nargs="+", help="OUTPUT_DIR of each run")
    print(compare(parser.parse_args().output_dirs))
