"""The table that the examples print: what was selected, and what moved."""

from collections.abc import Mapping

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fishertune_d2.fisher import Selection


def table(
    before: Mapping[str, Tensor], model: nn.Module, selection: Selection, backbone: str
) -> str:
    """Numbers of weights, and of those that have another value than before.

    Args:
        before: the model's weights before training, by name.
        model: the model after it.
        selection: what was selected of its backbone.
        backbone: its name in the model; "" where it is all of the model but the ``head``.
    """
    prefix = f"{backbone}." if backbone else ""
    masks = {prefix + name: mask for name, mask in selection.masks(selection.share).items()}
    rows = {"backbone, selected": [0, 0], "backbone, not selected": [0, 0], "all else": [0, 0]}
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != before[name]
        mask = masks.get(name, torch.zeros_like(moved))
        places = {"backbone, selected": mask, "backbone, not selected": ~mask}
        if not name.startswith(prefix) or name.startswith("head."):
            places = {"all else": torch.ones_like(moved)}
        for row, place in places.items():
            rows[row][0] += int(place.sum())
            rows[row][1] += int(moved[place].sum())
    return tabulate([[row, *n] for row, n in rows.items()], ["weights", "all", "moved"], intfmt=",")
