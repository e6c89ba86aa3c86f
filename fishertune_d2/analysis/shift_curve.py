"""Draws F against DRF as the simulated shift grows, as the paper's Fig. 4.

python -m fishertune_d2.analysis.shift_curve shift.json
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.analysis.figures import draw_json_file
from fishertune_d2.fisher import KINDS


def draw_shift_curve(measured: Mapping[str, Any], path: Path) -> None:
    """Draws how the information, the selection and its kinds change with the shift.

    Args:
        measured: ``images`` and ``seed`` of the measurement, the ``strengths`` of the shift, and
            lists with one number for each strength. ``fisher`` is mean F(x') over mean F(x), and
            ``drf`` is mean DRF over mean F(x). ``overlap_fisher`` and ``overlap_change`` are the
            shares in [0, 1] of DRF's selection that F(x) alone and dF alone select too. ``kinds``
            holds the share in [0, 1] of each kind in DRF's selection. None marks a missing value,
            such as that of dF at strength 0.
        path: the PNG to write.
    """
    strengths = measured["strengths"]

    def curve(key: str) -> np.ndarray:
        return np.array(measured[key], dtype=float)  # None becomes NaN, a gap in the line

    figure = Figure(figsize=(12, 3.5), layout="constrained")
    values, overlaps, kinds = figure.subplots(1, 3)
    values.plot(strengths, curve("fisher"), marker="o", label="F(x')")
    values.plot(strengths, curve("drf"), marker="s", label="DRF")
    values.axhline(1, color="grey", linewidth=0.8, linestyle=":", label="F(x)")
    values.set_ylim(bottom=0)
    values.set_ylabel("mean / mean F(x)")
    values.set_title("information over all candidates", fontsize=9)

    overlaps.plot(strengths, 100 * curve("overlap_fisher"), marker="o", label="with F(x) alone")
    overlaps.plot(strengths, 100 * curve("overlap_change"), marker="^", label="with dF alone")
    overlaps.set_ylim(-3, 103)
    overlaps.set_ylabel("% of the selected weights")
    overlaps.set_title("DRF's selection, in common", fontsize=9)

    shares = [100 * np.array(measured["kinds"][kind], dtype=float) for kind in KINDS]
    kinds.stackplot(strengths, shares, labels=KINDS, alpha=0.8)
    kinds.set_ylim(0, 100)
    kinds.set_ylabel("% of the selected weights")
    kinds.set_title("DRF's selection, by kind", fontsize=9)
    kinds.margins(x=0)

    for panel in (values, overlaps, kinds):
        panel.set_xlabel("strength of the simulated shift")
    values.legend(fontsize=8)
    overlaps.legend(fontsize=8)
    # Beside the areas, which fill their panel, and in their order from the top.
    kinds.legend(fontsize=8, reverse=True, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.suptitle(f"{measured['images']} images, seed {measured['seed']}", fontsize=9)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw_json_file(__doc__, draw_shift_curve)
