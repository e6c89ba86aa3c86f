"""Draws how much of the real shift's selection each simulated shift finds.

python -m fishertune_d2.analysis.real_shift real_shift.json
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.analysis.figures import draw_json_file

# Drawn as lines, because every simulation is to be compared with them.
LINES = {
    "real, other half": ("black", "--"),
    "no shift": ("tab:red", "-"),
    "F alone": ("tab:orange", "-"),
    "random": ("black", ":"),
}


def shared_seeds(rows: Iterable[Mapping[str, Any]]) -> set[int]:
    """Finds the seeds that all shifts have, so that their means compare.

    Args:
        rows: see :func:`draw_real_shift`.

    Returns:
        The seeds, from the rows where the real shift's F(x) is from the same images.
    """
    seeds_of: dict[str, set[int]] = {}
    for row in rows:
        if row["x"] == "same":
            seeds_of.setdefault(row["shift"], set()).add(row["seed"])
    return set.intersection(*seeds_of.values())


def draw_real_shift(measured: Mapping[str, Any], path: Path) -> None:
    """Draws bars for the simulated shifts, and lines for the ceiling, the controls and chance.

    Args:
        measured: ``rows``, each with a ``seed``, the ``unit``, the ``score`` and its ``rho``, the
            images ``x`` that the real shift's F(x) is from (``"same"`` or ``"other"``), the name of
            the ``shift``, and the ``overlap``: the share in [0, 1] of the real shift's selection
            that this one selects too. Only the rows with the same images are drawn, and only the
            seeds that all shifts have, because means over other seeds do not compare.
        path: the PNG to write.
    """
    shared = shared_seeds(measured["rows"])
    found: dict[tuple[str, str], dict[str, list[float]]] = {}
    for row in measured["rows"]:
        if row["x"] == "same" and row["seed"] in shared:
            panel = found.setdefault((row["unit"], f"{row['score']}, rho {row['rho']}"), {})
            panel.setdefault(row["shift"], []).append(100 * row["overlap"])
    units = list(dict.fromkeys(unit for unit, _ in found))
    figure = Figure(figsize=(13, 3 * len(units)), layout="constrained")
    panels = figure.subplots(len(units), len(found) // len(units), sharey=True, squeeze=False)
    for axes, ((unit, score), shifts) in zip(panels.flat, found.items(), strict=True):
        bars = [name for name in shifts if name not in LINES]
        axes.bar(bars, [np.mean(shifts[name]) for name in bars], color="tab:blue", alpha=0.6)
        for place, name in enumerate(bars):  # a point for each seed
            axes.plot([place] * len(shifts[name]), shifts[name], "k.", markersize=4)
        for name, (color, style) in LINES.items():
            if name not in shifts:
                continue
            axes.axhline(np.mean(shifts[name]), color=color, linestyle=style, label=name)
        axes.set_title(f"{unit}s, {score}", fontsize=9)
        axes.tick_params(axis="x", rotation=90, labelsize=8)
        axes.set_ylim(0, 100)
    for axes in panels[:, 0]:
        axes.set_ylabel("% of the real shift's selection")
    for axes in panels[:-1].flat:
        axes.tick_params(axis="x", labelbottom=False)
    panels[0, 0].legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    draw_json_file(__doc__, draw_real_shift)
