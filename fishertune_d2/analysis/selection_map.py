"""Where the selected weights are: block by kind, as the paper's Fig. 6 lays it out.

python -m fishertune_d2.analysis.selection_map outputs/demo
"""

import argparse
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.fisher import KINDS, Selection
from fishertune_d2.fisher.candidates import groups_of


def shares_by_group(selection: Selection) -> np.ndarray:
    """The share of each group's weights that is selected.

    Returns:
        (kinds, blocks) in percent, kinds in the order of ``KINDS``; NaN for a group that the
        model lacks.
    """
    totals: dict[tuple[str, int], int] = {}
    for name, shape in selection.shapes.items():
        width = int(np.prod(shape[1:]))
        for kind, block, rows in groups_of(name, shape[0]):
            size = (rows.stop - rows.start) * width
            totals[kind, block] = totals.get((kind, block), 0) + size
    shares = np.full((len(KINDS), 1 + max(block for _, block in totals)), np.nan)
    for (kind, block), count in selection.summary().items():
        shares[KINDS.index(kind), block] = 100 * count / totals[kind, block]
    return shares


def draw_selection_map(selection: Selection, path: Path) -> None:
    """Draws :func:`shares_by_group` as a picture.

    Args:
        selection: the ranked choice.
        path: the PNG to write.
    """
    shares = shares_by_group(selection)
    kinds, blocks = shares.shape
    figure = Figure(figsize=(2.2 + 0.42 * blocks, 2.9), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, cmap="viridis", aspect="auto", vmin=0)
    for kind in range(kinds):
        for block in range(blocks):
            value = shares[kind, block]
            if np.isnan(value):
                continue
            color = "black" if value > 0.6 * np.nanmax(shares) else "white"
            text = f"{value:.0f}" if value >= 9.5 else f"{value:.1f}"
            axes.text(block, kind, text, ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(blocks), range(blocks))
    axes.set_yticks(range(kinds), KINDS)
    axes.set_xlabel("block")
    count = sum(len(indices) for indices in selection.indices.values())
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
    file = Path(output_dir) / "selection.safetensors"
    if not file.is_file():
        return None
    picture = file.with_suffix(".png")
    draw_selection_map(Selection.load(file), picture)
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", help="OUTPUT_DIR of a run that selected weights")
    output_dir = parser.parse_args().output_dir
    with ending_in_a_sentence():
        picture = draw_run(output_dir)
    if picture is None:
        parser.error(f"there is no selection.safetensors in {output_dir}: its run selected nothing")
    print(picture)
