"""Draws how fast each estimator's choice of weights settles, over images and over time.

python -m fishertune_d2.analysis.convergence convergence.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.analysis.figures import MARKERS, draw_json_file


def draw_convergence(measured: Mapping[str, Any], path: Path) -> None:
    """Draws the overlap with the reference: by F and by DRF, against images and against time.

    Args:
        measured: ``reference`` is the plain loop, with its ``images`` and ``seconds_per_image``.
            ``curves`` each have their ``estimator`` and lists of the same length: ``images``,
            ``seconds``, and ``overlap`` and ``drf_overlap``, the shares in [0, 1] of the weights
            selected by the reference that the estimator selects too.
        path: the PNG to write.
    """
    reference = measured["reference"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey=True)
    for curve, marker in zip(measured["curves"], MARKERS * len(measured["curves"]), strict=False):
        times = np.array(curve["seconds"]) / reference["seconds_per_image"]
        for row, key in zip(axes, ("overlap", "drf_overlap"), strict=True):
            for panel, costs in zip(row, (curve["images"], times), strict=True):
                panel.plot(
                    costs,
                    100 * np.array(curve[key], dtype=float),
                    marker=marker,
                    markerfacecolor="none",
                    linewidth=1,
                    label=curve["estimator"],
                )
    for row, score in zip(axes, ("F", "DRF"), strict=True):
        row[0].set_ylabel(f"% of the selection by {score} in common")
    for panel in axes.flat:
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(alpha=0.3)
    axes[0, 0].set_ylim(top=102)
    axes[1, 0].set_xlabel("images")
    axes[1, 1].set_xlabel("time in images of the plain loop")
    figure.suptitle(
        f"weights selected in common with the plain loop over {reference['images']} images",
        fontsize=9,
    )
    axes[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw_json_file(__doc__, draw_convergence)
