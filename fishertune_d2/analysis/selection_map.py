"""Draws the share of selected weights by block and kind, in the layout of the paper's Fig. 6.

python -m fishertune_d2.analysis.selection_map outputs/demo
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from fishertune_d2.analysis.figures import draw_groups, group_array
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.fisher import Selection
from fishertune_d2.run import Run


def shares_by_group(selection: Selection) -> np.ndarray:
    """The selected share of each group's weights in percent, as ``figures.group_array``."""
    totals, counts = selection.group_sizes(), selection.summary()
    return group_array({group: 100 * counts[group] / totals[group] for group in counts})


def draw_selection_map(selection: Selection, path: Path) -> None:
    """Draws :func:`shares_by_group` into a PNG file."""
    shares = shares_by_group(selection)
    figure = Figure(figsize=(2.2 + 0.42 * shares.shape[1], 2.9), layout="constrained")
    axes = figure.subplots()
    norm = Normalize(0, np.nanmax(shares))
    image = draw_groups(axes, shares, norm, lambda v: f"{v:.0f}" if v >= 9.5 else f"{v:.1f}")
    axes.set_xlabel("block")
    count = selection.weights(selection.share)
    axes.set_title(
        f"{count:,} of {selection.base:,} weights tuned ({100 * count / selection.base:.1f} %)",
        fontsize=9,
    )
    figure.colorbar(image, label="% of the group")
    figure.savefig(path, dpi=150)


def draw_run(output_dir: str | Path) -> Path | None:
    """Draws the selection of a run beside its file.

    Returns:
        The picture's path, ``selection.png``; None if the run selected nothing.
    """
    run = Run(Path(output_dir))
    if not run.selection_file.is_file():
        return None
    picture = run.selection_file.with_suffix(".png")
    draw_selection_map(run.load_selection(), picture)
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="OUTPUT_DIR of a run that selected weights")
    run = Run(parser.parse_args().output_dir)
    with ending_in_a_sentence():
        run.load_selection()  # says so if the run selected nothing
        print(draw_run(run.folder))
