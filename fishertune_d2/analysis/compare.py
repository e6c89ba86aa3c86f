"""Prints one table over several runs, in Markdown: mIoU by data set, or IoU by class of one set.

python -m fishertune_d2.analysis.compare outputs/camvid/freeze outputs/camvid/full ...
python -m fishertune_d2.analysis.compare OUTPUT_DIR ... --classes acdc_val

A run in a study's table is named as if the table were a folder:
``docs/results/selection.jsonl/dinov2_vits/freeze_42``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from fishertune_d2.analysis.statistics import format_weights, markdown_table
from fishertune_d2.analysis.study import read_results
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.run import ENTRY, Results, Run, require_same_protocol, variant

_VARY = (*ENTRY, "vfm")


def compare(output_dirs: Sequence[str | Path]) -> str:
    """Compares runs: the tuned weights, mIoU by data set, and the average over unseen domains.

    Args:
        output_dirs: The OUTPUT_DIR of each run, or its path in a study's table. Runs with
            different test sets or protocols raise a ValueError.

    Returns:
        A Markdown table, and a line with the protocol that the runs share.
    """
    runs = _read(output_dirs)
    columns = [*runs[0].scores, "average over unseen"]
    scores = [[*run.scores.values(), run.target_average] for run in runs]
    return _format(output_dirs, runs, columns, scores)


def compare_classes(output_dirs: Sequence[str | Path], name: str) -> str:
    """Compares the IoU by class of one data set, as the paper's Table 2.

    Args:
        output_dirs: See :func:`compare`.
        name: A data set on which the runs were tested.

    Returns:
        A Markdown table as from :func:`compare`, with a column for each class and one for their
        mean; a class that was not scored has "-".

    Raises:
        ValueError: The runs were not tested on the data set.
    """
    runs = _read(output_dirs)
    if name not in runs[0].scores:
        raise ValueError(
            f"the runs were not tested on {name!r}; choose one of {', '.join(runs[0].scores)}"
        )
    classes = runs[0].protocol["classes"][name]
    scores = [
        [*(run.per_class[name].get(label) for label in classes), run.scores[name]] for run in runs
    ]
    return _format(output_dirs, runs, [*classes, f"mIoU of {name}"], scores)


def _read(output_dirs: Sequence[str | Path]) -> list[Results]:
    runs = [read_results(folder) for folder in output_dirs]
    require_same_protocol(runs, vary=_VARY)
    return runs


def _label(output_dir: str | Path, results: Results) -> str:
    """The method, and what tells the run from others of it; a study's table holds no config."""
    run, label = Run(Path(output_dir)), results.protocol["method"]
    if run.config_file.is_file():
        label += variant(run.config)
    return label + (", perturbed" if results.protocol.get("feature_perturbation") else "")


def _format(
    output_dirs: Sequence[str | Path],
    runs: Sequence[Results],
    columns: Sequence[str],
    scores: Sequence[Sequence[float | None]],
) -> str:
    """Formats a line for each run: its method, its scores and its commit."""
    headers = ["foundation model", "method", "backbone weights tuned", *columns, "commit"]
    lines = [
        [
            run.protocol.get("vfm", "-"),  # runs of the first commits did not record it
            _label(folder, run),
            "-" if run.tuned_parameters is None else format_weights([run.tuned_parameters]),
            *("-" if score is None else f"{score:.2f}" for score in of_run),
            run.commit,
        ]
        for folder, run, of_run in zip(output_dirs, runs, scores, strict=True)
    ]
    hidden = {*_VARY, "name", "test_size", "classes", "label_map"}
    shared = [runs[0].protocol_name] if runs[0].protocol_name else []
    shared += [f"{k} {v}" for k, v in runs[0].protocol.items() if k not in hidden]
    return f"{markdown_table(lines, headers)}\n\nProtocol: {', '.join(shared)}"


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "output_dirs", nargs="+", help="the OUTPUT_DIR of each run, or its path in a study's table"
    )
    parser.add_argument("--classes", metavar="NAME", help="show IoU by class of this data set")
    args = parser.parse_args()
    with ending_in_a_sentence():
        if args.classes:
            print(compare_classes(args.output_dirs, args.classes))
        else:
            print(compare(args.output_dirs))


if __name__ == "__main__":
    main()
