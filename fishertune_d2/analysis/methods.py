"""Writes a table and a figure of methods with several seeds, as the paper's Table 4 and Fig. 5.

python -m fishertune_d2.analysis.methods outputs/bench/camvid/dinov2_vits [METHOD ...]
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.analysis.statistics import (
    format_difference,
    format_mean,
    format_weights,
    markdown_table,
    paired_difference,
)
from fishertune_d2.analysis.study import find_runs, split_place
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.run import ENTRY, Results, require_same_protocol

OURS = "fishertune"  # the method that all others are compared with


def read_methods(
    place: str | Path, methods: Sequence[str] | None = None, test: bool = False
) -> dict[str, list[Results]]:
    """Reads the scores of the finished runs in a folder, each named <method>_<seed>.

    Args:
        place: The folder that holds the runs' folders, or a study's table.
        methods: The methods to read, in this order; None reads all, by name.
        test: Whether to read the scores on the test sets, in <method>_<seed>/test.

    Returns:
        The scores of each method, in the order of the seeds.

    Raises:
        ValueError: There is no run, a method has none, or a run's seed is not that of its name;
            also for runs with different test sets or protocols.
    """
    found: dict[str, list[Results]] = {}
    for path, results in find_runs(place, test).items():
        method, _, seed = Path(path).name.rpartition("_")
        if methods is not None and method not in methods:
            continue
        if seed != str(results.seed):  # differences to another method are taken seed by seed
            raise ValueError(f"{path} ran with seed {results.seed}: name it <method>_<seed>")
        found.setdefault(method, []).append(results)
    expected = "<method>_<seed>/test" if test else "<method>_<seed>"
    for method in methods or ():
        if method not in found:
            raise ValueError(f"no finished run of {method!r} in {place}: expected {expected}")
    if not found:
        raise ValueError(f"no finished run in {place}: expected {expected}/results.json")
    every = [results for runs in found.values() for results in runs]
    require_same_protocol(every, vary=(*ENTRY, "seed"))
    for runs in found.values():
        runs.sort(key=lambda results: results.seed)
    return {method: found[method] for method in (methods or sorted(found))}


def table(methods: Mapping[str, Sequence[Results]]) -> str:
    """Formats a Markdown table: mean and standard deviation (of a sample) over seeds.

    Args:
        methods: The scores of each method, from :func:`read_methods`.

    Returns:
        The table. Its last column is the difference of ``fishertune`` and the method in the mean of
        all test sets, over the seeds that both have, with its confidence interval.
    """
    names = list(next(iter(methods.values()))[0].scores)
    paired = _means_by_seed(methods.get(OURS, ()))
    lines = []
    for method, runs in methods.items():
        means = _means_by_seed(runs)
        difference = paired_difference(paired, means) if method != OURS else None
        lines.append(
            [
                method,
                len(runs),
                format_weights(tuned_counts(runs)),
                *(format_mean([results.scores[name] for results in runs]) for name in names),
                format_mean(list(means.values())),
                ", ".join(commits_of(runs)),
                format_difference(difference),
            ]
        )
    headers = ["method", "seeds", "backbone weights tuned", *names, "mean of all test sets"]
    headers += ["commits", f"{OURS} minus method"]
    return markdown_table(lines, headers)


def tuned_counts(runs: Sequence[Results]) -> list[int]:
    """Returns the numbers of backbone weights that runs tuned or added, without repetitions."""
    return sorted({r.tuned_parameters for r in runs if r.tuned_parameters is not None})


def commits_of(runs: Sequence[Results]) -> list[str]:
    """Returns the commits that scored the runs, without repetitions."""
    return sorted({results.commit for results in runs})


def scores_by_set(methods: Mapping[str, Sequence[Results]]) -> dict[str, dict[str, list[float]]]:
    """Returns the mIoU of each method, test set and seed, for :func:`draw`."""
    return {
        method: {name: [results.scores[name] for results in runs] for name in runs[0].scores}
        for method, runs in methods.items()
    }


def draw(
    methods: Mapping[str, Mapping[str, Sequence[float]]],
    path: Path,
    marks: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Draws a line for each method: a point for each seed and test set, and a bar at their mean.

    Args:
        methods: The mIoU of each seed, by method and test set; all methods have the same sets.
        path: The PNG to write.
        marks: Numbers to compare with, by method and test set, drawn as crosses.
    """
    names = list(next(iter(methods.values())))
    step = 0.7 / len(names)  # a method's line has its test sets one below the other
    height = 1.2 + len(methods) * (0.2 + 0.12 * len(names))
    figure = Figure(figsize=(7, height), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(names):
        for place, (method, scores) in enumerate(methods.items()):
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
            mark = (marks or {}).get(method, {}).get(name)
            if mark is not None:
                axes.plot(mark, y, linestyle="none", marker="x", color=f"C{i}")
    for place in range(1, len(methods)):
        axes.axhline(place - 0.5, color="lightgrey", linewidth=0.8)
    axes.set_yticks(range(len(methods)), methods)
    axes.set_ylim(len(methods) - 0.5, -0.5)  # the first method on top
    cross = "; a cross for the paper's" if marks else ""
    axes.set_xlabel(f"mIoU in %; a point for each seed, a bar at their mean{cross}")
    axes.grid(alpha=0.3, axis="x")
    figure.legend(loc="outside upper center", ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


def _means_by_seed(runs: Sequence[Results]) -> dict[int, float]:
    """Returns the mean over all test sets, source and unseen, by seed."""
    return {results.seed: float(np.mean(list(results.scores.values()))) for results in runs}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "folder", type=Path, help="the folder of runs named <method>_<seed>, or a study's table"
    )
    parser.add_argument(
        "methods", nargs="*", help="the methods to show, in this order (default: all)"
    )
    parser.add_argument("--test", action="store_true", help="show the scores on the test sets")
    parser.add_argument(
        "--output", type=Path, help="the figure (default: methods.png in the folder)"
    )
    args = parser.parse_args()
    with ending_in_a_sentence():
        if split_place(args.folder) and not args.output:
            raise ValueError(f"{args.folder} is a table: name the figure with --output FILE.png")
        picture = args.output or args.folder / "methods.png"
        runs = read_methods(args.folder, args.methods or None, args.test)
        print(table(runs))
        draw(scores_by_set(runs), picture)
    print(picture)


if __name__ == "__main__":
    main()
