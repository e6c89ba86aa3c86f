"""Draws how sensitive each group of weights is: F and DRF by block and kind, as the paper's Fig. 6.

python -m fishertune_d2.analysis.sensitivity_map outputs/demo [outputs/another ...]
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator

from fishertune_d2.analysis.figures import draw_groups, group_array
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.fisher import FisherEstimate, domain_related_fisher
from fishertune_d2.fisher.candidates import groups_of
from fishertune_d2.run import Run


def mean_by_group(scores: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The mean score of each group's weights, over the mean of all candidates: 1 is average.

    Args:
        scores: scores by parameter name, not negative.

    Returns:
        Means, as ``figures.group_array``.

    Raises:
        ValueError: if no candidate scores above 0, so that there is no mean to divide by.
    """
    sums: dict[tuple[str, int], float] = {}
    counts: dict[tuple[str, int], int] = {}
    groups = groups_of({name: tuple(score.shape) for name, score in scores.items()})
    for name, score in scores.items():
        for kind, block, rows in groups[name]:
            part = score[rows]
            # In float64: a group holds millions of numbers around 1e-8.
            total = part.sum(dtype=torch.float64).item()
            sums[kind, block] = sums.get((kind, block), 0.0) + total
            counts[kind, block] = counts.get((kind, block), 0) + part.numel()
    if not sum(sums.values()) > 0:
        raise ValueError(
            f"none of the {len(scores)} parameters has a candidate that scores above 0: "
            "estimate with a loss that reaches the backbone's blocks"
        )
    average = sum(sums.values()) / sum(counts.values())
    return group_array({group: sums[group] / counts[group] / average for group in sums})


def draw_sensitivity_map(
    estimates: Sequence[tuple[str, FisherEstimate]],
    path: Path,
    options: Sequence[Mapping[str, Any]] | None = None,
) -> None:
    """Draws :func:`mean_by_group` of F(x) and of DRF, two panels for each estimate.

    Args:
        estimates: estimates, each after the name to print above its panels.
        path: the PNG to write.
        options: for each estimate the options of :func:`domain_related_fisher`, such as
            ``Run.score_options``; by default none.

    Raises:
        ValueError: if an estimate has no F(x'), which DRF needs.
    """
    panels = []
    for (name, estimate), score in zip(estimates, options or [{}] * len(estimates), strict=True):
        if not estimate.shifted:
            raise ValueError(f"{name} has no F(x') to compute DRF from: estimate with `perturb`")
        drf = domain_related_fisher(estimate, **score)
        known = {key: estimate.notes.get(key, "unknown") for key in ("estimator", "labels")}
        made = f"{known['estimator']}, {known['labels']} labels, {estimate.images} images"
        panels.append((f"{name}, F(x): {made}", mean_by_group(estimate.f)))
        form = f" ({score['form']})" if "form" in score else ""
        panels.append((f"{name}, DRF{form}: {made}", mean_by_group(drf)))
    positive = np.concatenate([means[means > 0] for _, means in panels])
    norm = LogNorm(positive.min(), positive.max())
    blocks = max(means.shape[1] for _, means in panels)
    figure = Figure(figsize=(2.2 + 0.43 * blocks, 0.3 + 1.7 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels))
    # Panels are stacked, so that a block has the same place in all of them.
    for panel, (title, means) in zip(axes, panels, strict=True):
        image = draw_groups(panel, means, norm, _short)
        panel.set_title(title, fontsize=9)
    axes[-1].set_xlabel("block")
    bar = figure.colorbar(image, ax=axes, label="mean of the group / mean of all candidates")
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    bar.ax.yaxis.set_major_formatter("{x:g}")
    figure.savefig(path, dpi=150)


def _short(value: float) -> str:
    if value >= 9.5:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 0.95 else f"{value:.2g}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dirs", nargs="+", type=Path, help="OUTPUT_DIR of each run")
    parser.add_argument("--output", type=Path, help="default: sensitivity.png in the first folder")
    args = parser.parse_args()
    picture = args.output or args.output_dirs[0] / "sensitivity.png"
    with ending_in_a_sentence():
        runs = [Run(folder) for folder in args.output_dirs]
        estimates = [(run.name, run.load_estimate()) for run in runs]
        draw_sensitivity_map(estimates, picture, [run.score_options for run in runs])
    print(picture)
