"""One table over several runs, in Markdown: mIoU by data set, or IoU by class of one data set.

python -m fishertune_d2.analysis.compare outputs/camvid/freeze outputs/camvid/full ...
python -m fishertune_d2.analysis.compare OUTPUT_DIR ... --classes acdc_val
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.evaluation import all_scores


def compare(output_dirs: Sequence[str | Path]) -> str:
    """Reads each run's ``results.json`` into a row: what was tuned, mIoU by data set, average.

    Args:
        output_dirs: OUTPUT_DIR of each run; all with the same test sets and the same protocol.

    Returns:
        A Markdown table, and a line with the protocol that the rows share.

    Raises:
        ValueError: if the runs differ in test sets or protocol, which would compare unlike things.
    """
    runs = _read(output_dirs)
    columns = [*all_scores(runs[0]), "average over unseen"]
    return _format(
        runs, columns, [[*all_scores(run).values(), run["target_average"]] for run in runs]
    )


def compare_classes(output_dirs: Sequence[str | Path], name: str) -> str:
    """Reads IoU by class of one data set from each run's ``results.json``, as the paper's Table 2.

    Args:
        output_dirs: as for :func:`compare`.
        name: one of the data sets that the runs were tested on.

    Returns:
        As :func:`compare`, with a column for each class and one for their mean; "-" where a class
        was not scored.

    Raises:
        ValueError: as :func:`compare`, or if the runs were not tested on the data set.
    """
    runs = _read(output_dirs)
    if name not in all_scores(runs[0]):
        raise ValueError(
            f"the runs were not tested on {name!r}; choose one of {', '.join(all_scores(runs[0]))}"
        )
    classes = runs[0]["protocol"]["classes"][name]
    scores = [
        [*(run["per_class"][name].get(label) for label in classes), all_scores(run)[name]]
        for run in runs
    ]
    return _format(runs, [*classes, f"mIoU of {name}"], scores)


def _read(output_dirs: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Reads the runs' results; raises a ValueError unless they are alike."""
    runs = [json.loads((Path(folder) / "results.json").read_text()) for folder in output_dirs]
    for folder, run in zip(output_dirs, runs, strict=True):
        if (_shared(run), list(all_scores(run))) != (_shared(runs[0]), list(all_scores(runs[0]))):
            raise ValueError(
                f"{folder} was scored by another protocol or on other data than {output_dirs[0]}"
            )
    return runs


def _shared(run: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's protocol that does not tell the rows apart."""
    columns = ("vfm", "method", "feature_perturbation", "commit")
    return {k: v for k, v in run["protocol"].items() if k not in columns}


def _format(
    runs: list[dict[str, Any]], columns: list[str], scores: list[list[float | None]]
) -> str:
    """Formats a row of scores for each run between what was run and its commit."""
    headers = ["foundation model", "method", "backbone weights tuned", *columns, "commit"]
    rows = [
        [
            run["protocol"].get("vfm", "-"),  # runs of the first commits do not say it
            run["protocol"]["method"]
            + (", perturbed" if run["protocol"].get("feature_perturbation") else ""),
            f"{run['tuned_parameters'] / 1e6:.2f} M",
            *("-" if score is None else f"{score:.2f}" for score in row),
            run["protocol"]["commit"],
        ]
        for run, row in zip(runs, scores, strict=True)
    ]
    table = tabulate(rows, headers, tablefmt="github", disable_numparse=True)
    shown = {k: v for k, v in _shared(runs[0]).items() if k not in ("test_size", "classes")}
    return f"{table}\n\nProtocol: " + ", ".join(f"{k} {v}" for k, v in shown.items())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dirs", nargs="+", help="OUTPUT_DIR of each run")
    parser.add_argument("--classes", metavar="NAME", help="IoU by class of this data set")
    args = parser.parse_args()
    with ending_in_a_sentence():
        if args.classes:
            print(compare_classes(args.output_dirs, args.classes))
        else:
            print(compare(args.output_dirs))
