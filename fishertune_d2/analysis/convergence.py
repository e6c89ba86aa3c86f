"""How fast each estimator's choice of weights settles, by images and by time.

python -m fishertune_d2.analysis.convergence convergence.json
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.command_line import ending_in_a_sentence

_MARKERS = "osD^vPX*"  # curves of estimators that agree lie on each other


def draw_convergence(measured: Mapping[str, Any], path: Path) -> None:
    """Draws the overlap with the reference: by F and by DRF, against images and against time.

    Args:
        measured: ``reference``, the plain loop, with its ``images`` and ``seconds_per_image``; and
            ``curves``, each with its ``estimator`` and lists of the same length: ``images``,
            ``seconds``, ``overlap`` and ``drf_overlap``, the share of what the reference selects
            that the estimator selects too, in [0, 1].
        path: the PNG to write.
    """
    reference = measured["reference"]
    figure = Figure(figsize=(10, 7), layout="constrained")
    axes = figure.subplots(2, 2, sharex="col", sharey=True)
    for curve, marker in zip(measured["curves"], _MARKERS * len(measured["curves"]), strict=False):
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
        row[0].set_ylabel(f"% in common, selected by {score}")
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON that a benchmark wrote")
    parser.add_argument("--output", type=Path, help="default: FILE with .png")
    args = parser.parse_args()
    picture = args.output or args.file.with_suffix(".png")
    with ending_in_a_sentence():
        draw_convergence(json.loads(args.file.read_text()), picture)
    print(picture)
