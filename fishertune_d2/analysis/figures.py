"""Parts that several figures share: the map of the groups of weights, markers, and a command.

Shapes: K kinds of weights in the order of ``KINDS``, B blocks.
"""

import argparse
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.image import AxesImage

from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.fisher import KINDS

# One for each curve or domain, so that those that overlap can be told apart.
MARKERS = "osD^vPX*"


def group_array(values: Mapping[tuple[str, int], float]) -> np.ndarray:
    """Arranges values of groups, by kind and block, as (K, B); NaN for a group without a value."""
    array = np.full((len(KINDS), 1 + max(block for _, block in values)), np.nan)
    for (kind, block), value in values.items():
        array[KINDS.index(kind), block] = value
    return array


def draw_groups(
    axes: Axes, values: np.ndarray, norm: Normalize, write: Callable[[float], str]
) -> AxesImage:
    """Draws a number for each group of weights: a row for each kind, a column for each block.

    Args:
        axes: the panel.
        values: (K, B), see :func:`group_array`.
        norm: from a value to its place on the colour scale.
        write: from a value to its text.

    Returns:
        The image, for a colour bar.
    """
    image = axes.imshow(values, cmap="viridis", aspect="auto", norm=norm)
    for (kind, block), value in np.ndenumerate(values):
        if np.isnan(value):
            continue
        place = norm(value)
        # A masked place, such as that of 0 on a logarithmic scale, has no colour behind the text.
        dark = place is np.ma.masked or place > 0.6
        color = "black" if dark else "white"
        axes.text(block, kind, write(value), ha="center", va="center", color=color, fontsize=7)
    axes.set_xticks(range(values.shape[1]), [str(block) for block in range(values.shape[1])])
    axes.set_yticks(range(len(KINDS)), KINDS)
    return image


def draw_json_file(description: str, draw: Callable[[Mapping[str, Any], Path], None]) -> None:
    """Runs the command of a figure whose numbers a benchmark wrote as JSON.

    Args:
        description: the command's help text.
        draw: draws the numbers into a PNG file.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("file", type=Path, help="JSON that a benchmark wrote")
    parser.add_argument("--output", type=Path, help="default: FILE with .png")
    args = parser.parse_args()
    picture = args.output or args.file.with_suffix(".png")
    with ending_in_a_sentence():
        draw(json.loads(args.file.read_text()), picture)
    print(picture)
