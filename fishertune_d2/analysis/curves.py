"""Writes a table and a figure of the mIoU along long trainings, from a study's table.

python -m fishertune_d2.analysis.curves docs/results/curves_streets.jsonl --output curves.png
"""

import argparse
from collections.abc import Mapping, Sequence
from itertools import compress
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.analysis.statistics import format_mean, markdown_table
from fishertune_d2.analysis.study import StudyRun, read_table
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.run import RunError

# By entry with its rate: the seeds, of each the iterations and the mean mIoU in percent over the
# unseen sets.
Curves = dict[str, dict[int, list[tuple[int, float]]]]


def read_curves(table: Path) -> Curves:
    """Reads the curves of a study's full trainings; a search's shorter trainings have none.

    Each foundation model, source, entry and learning rate has a curve of its own.

    Args:
        table: A table that ``fishertune_d2.bench --save`` wrote from runs with TEST.EVAL_PERIOD.

    Returns:
        The mean over the unseen data sets at each iteration, in percent.

    Raises:
        RunError: No run of the table has a curve.
    """
    found: dict[tuple[str, str, str], dict[int, list[tuple[int, float]]]] = {}
    for run in read_table(table):
        curve = [] if run.searched else _mean_curve(run)
        if curve:
            name = Path(run.run).name.rpartition("_")[0]  # the entry, and its rate if it has one
            found.setdefault((run.vfm, " + ".join(run.train), name), {})[run.seed] = curve
    if not found:
        raise RunError(
            f"no run in {table} was scored during its training: train with TEST.EVAL_PERIOD"
        )
    # A name has the parts in which the curves differ, and always the entry.
    several = [len(set(parts)) > 1 for parts in zip(*found, strict=True)]
    several[-1] = True
    return {", ".join(compress(parts, several)): seeds for parts, seeds in found.items()}


def _mean_curve(run: StudyRun) -> list[tuple[int, float]]:
    """The mean mIoU over the unseen sets at each iteration at which all of them were scored."""
    curves = run.content.get("curves", {})
    by_set = [dict(curves[name]) for name in run.content["targets"] if name in curves]
    if not by_set:
        return []
    shared = set(by_set[0]).intersection(*by_set[1:])
    return [(i, float(np.mean([values[i] for values in by_set]))) for i in sorted(shared)]


def table_of(curves: Curves, marks: Sequence[int]) -> str:
    """Formats a Markdown table: the mean over seeds at some iterations, and the highest mean.

    Args:
        curves: From :func:`read_curves`.
        marks: The iterations to show.

    Returns:
        The table, with the standard deviation over seeds where there are several.
    """
    lines = []
    for entry, seeds in curves.items():
        by_iteration = _by_iteration(seeds)
        best = max(by_iteration, key=lambda i: float(np.mean(by_iteration[i])))
        shown = [format_mean(by_iteration[i]) if i in by_iteration else "-" for i in marks]
        lines.append([entry, len(seeds), *shown, format_mean(by_iteration[best]), f"{best:,}"])
    headers = ["method", "seeds", *(f"{i:,}" for i in marks), "highest", "at"]
    return markdown_table(lines, headers)


def _by_iteration(seeds: Mapping[int, Sequence[tuple[int, float]]]) -> dict[int, list[float]]:
    """The scores of the seeds at each iteration that all of them have."""
    values = [dict(curve) for curve in seeds.values()]
    shared = set(values[0]).intersection(*values[1:])
    return {i: [each[i] for each in values] for i in sorted(shared)}


def draw_curves(curves: Curves, path: Path) -> None:
    """Draws the mean over seeds against the iterations, with a line for each entry.

    Args:
        curves: From :func:`read_curves`.
        path: The PNG to write.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for number, (entry, seeds) in enumerate(curves.items()):
        by_iteration = _by_iteration(seeds)
        iterations = list(by_iteration)
        color, style = f"C{number % 10}", "-" if number < 10 else "--"
        means = [float(np.mean(values)) for values in by_iteration.values()]
        axes.plot(iterations, means, style, color=color, linewidth=1.5, label=entry)
        if len(seeds) > 1:
            low, high = (list(map(f, by_iteration.values())) for f in (min, max))
            axes.fill_between(iterations, low, high, color=color, alpha=0.15, linewidth=0)
    axes.set_xlabel("iterations")
    axes.set_ylabel("mean mIoU in % over the unseen sets")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", type=Path, help="the study's table")
    parser.add_argument(
        "--at", type=int, nargs="+", default=[500, 1000, 2500, 5000], help="iterations to show"
    )
    parser.add_argument("--output", type=Path, help="the figure (default: TABLE with .png)")
    args = parser.parse_args()
    picture = args.output or args.table.with_suffix(".png")
    with ending_in_a_sentence():
        curves = read_curves(args.table)
        print(table_of(curves, args.at))
        draw_curves(curves, picture)
    print(picture)


if __name__ == "__main__":
    main()
