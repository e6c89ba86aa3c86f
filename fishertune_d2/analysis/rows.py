"""One table and one figure over rows of runs with several seeds, as the paper's Table 4 and Fig. 5.

python -m fishertune_d2.analysis.rows outputs/bench/camvid/dinov2_vits [ROW ...]
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from tabulate import tabulate

from fishertune_d2.analysis.statistics import format_difference, format_mean, paired_difference
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.evaluation import all_scores

_PAIRED_WITH = "fishertune"


def read_rows(
    folder: str | Path, rows: Sequence[str] | None = None
) -> dict[str, list[dict[str, Any]]]:
    """Reads ``results.json`` of the runs in a folder, each named <row>_<seed>.

    Args:
        folder: holds the runs' folders; what has no ``results.json`` is not finished, and skipped.
        rows: which rows to read, in this order; None for all, by name.

    Returns:
        For each row the results of its seeds, in the order of the seeds.

    Raises:
        ValueError: if there is no run, a row has none, a run's seed is not that of its name, or
            the runs differ in test sets or protocol, which would compare unlike things.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    first = None
    for file in sorted(Path(folder).glob("*_*/results.json")):
        row, _, seed = file.parent.name.rpartition("_")
        if rows is not None and row not in rows:
            continue
        results = json.loads(file.read_text())
        # Differences to another row are taken seed by seed.
        if seed != str(results["protocol"]["seed"]):
            raise ValueError(
                f"{file.parent} ran with seed {results['protocol']['seed']}: "
                "name its folder <row>_<seed>"
            )
        if first is None:
            first = (file.parent, results)
        _require_alike(*first, file.parent, results)
        found.setdefault(row, []).append(results)
    for row in rows or ():
        if row not in found:
            raise ValueError(f"no finished run of {row!r} in {folder}: expected {row}_<seed>")
    if not found:
        raise ValueError(f"no finished run in {folder}: expected <row>_<seed>/results.json")
    for results in found.values():
        results.sort(key=lambda result: result["protocol"]["seed"])
    return {row: found[row] for row in (rows or sorted(found))}


def table(rows: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """Formats rows as a Markdown table: mean and standard deviation over seeds.

    The last column is the difference to the row ``fishertune`` in the mean of all test sets, over
    the seeds that both have, with its confidence interval. Deviations are those of a sample.

    Args:
        rows: what :func:`read_rows` returned.
    """
    names = list(all_scores(next(iter(rows.values()))[0]))
    paired = _means_by_seed(rows.get(_PAIRED_WITH, ()))
    lines = []
    for row, results in rows.items():
        means = _means_by_seed(results)
        difference = paired_difference(paired, means) if row != _PAIRED_WITH else None
        tuned = sorted({result["tuned_parameters"] for result in results})
        commits = sorted({result["protocol"].get("commit") or "unknown" for result in results})
        lines.append(
            [
                row,
                len(results),
                ", ".join(f"{count / 1e6:.2f} M" for count in tuned),
                *(format_mean([all_scores(result)[name] for result in results]) for name in names),
                format_mean(list(means.values())),
                ", ".join(commits),
                format_difference(difference),
            ]
        )
    headers = ["row", "seeds", "backbone weights tuned", *names, "mean of all test sets"]
    headers += ["commits", f"{_PAIRED_WITH} minus row"]
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)


def scores_by_set(
    rows: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, dict[str, list[float]]]:
    """For each row and test set the mIoU of each seed, as :func:`draw` takes it.

    Args:
        rows: what :func:`read_rows` returned.
    """
    return {
        row: {name: [all_scores(r)[name] for r in results] for name in all_scores(results[0])}
        for row, results in rows.items()
    }


def draw(
    rows: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    marks: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draws a line for each row: a point for each seed and test set, and a bar at their mean.

    Args:
        rows: for each row and test set, the same sets in each, the mIoU of each seed.
        path: the PNG to write.
        marks: for some rows and test sets a number to compare with, drawn as a cross.
    """
    names = list(next(iter(rows.values())))
    step = 0.7 / len(names)  # test sets one below the other, within the row's line
    height = 1.2 + len(rows) * (0.2 + 0.12 * len(names))
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        for place, (row, scores) in enumerate(rows.items()):
            y = place + (i - (len(names) - 1) / 2) * step
            axes.plot(
                scores[name],
                [y] * len(scores[name]),
                linestyle="none",
                marker="o",
                markersize=5,
                alpha=0.6,
                markeredgewidth=0,
                color=f"C{i}",
                label=name if place == 0 else None,
            )
            mean = np.mean(scores[name])
            axes.vlines(mean, y - step / 2, y + step / 2, color=f"C{i}", linewidth=2)
            mark = (marks or {}).get(row, {}).get(name)
            if mark is not None:
                axes.plot(mark, y, linestyle="none", marker="x", color=f"C{i}")
    for place in range(1, len(rows)):
        axes.axhline(place - 0.5, color="lightgrey", linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_ylim(len(rows) - 0.5, -0.5)  # the first row on top
    cross = "; a cross for the paper's" if marks else ""
    axes.set_xlabel(f"mIoU in %; a point for each seed, a bar at their mean{cross}")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def _require_alike(first: Path, one: Mapping, folder: Path, other: Mapping) -> None:
    """Raises a ValueError unless two runs differ in nothing but how they tune, commit and seed."""
    ways = ("method", "feature_perturbation", "commit", "seed")
    compared = [
        {k: v for k, v in results["protocol"].items() if k not in ways}
        | {"test sets": list(all_scores(results))}
        for results in (one, other)
    ]
    differing = [
        key
        for key in dict.fromkeys([*compared[0], *compared[1]])
        if key not in compared[0] or key not in compared[1] or compared[0][key] != compared[1][key]
    ]
    if differing:
        raise ValueError(
            f"{folder} was scored by another protocol or on other data than {first}: they differ "
            f"in {', '.join(differing)}; name rows that are alike, or run one of them again"
        )


def _means_by_seed(results: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    """The mean over all test sets, source and unseen, by seed."""
    return {r["protocol"]["seed"]: float(np.mean(list(all_scores(r).values()))) for r in results}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="holds runs named <row>_<seed>")
    parser.add_argument("rows", nargs="*", help="rows to show, in this order (default: all)")
    parser.add_argument("--output", type=Path, help="default: rows.png in the folder")
    args = parser.parse_args()
    picture = args.output or args.folder / "rows.png"
    with ending_in_a_sentence():
        runs = read_rows(args.folder, args.rows or None)
        print(table(runs))
        draw(scores_by_set(runs), picture)
    print(picture)
