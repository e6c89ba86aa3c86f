"""The table that the examples print: the numbers of selected and of moved weights."""

from collections.abc import Mapping

import torch
from tabulate import tabulate
from torch import Tensor, nn

from fishertune_d2.fisher import Selection


def table(
    before: Mapping[str, Tensor], model: nn.Module, selection: Selection, backbone: str
) -> str:
    """Counts the weights of each part, and those with another value than before.

    Args:
        before: the model's weights before training, by name.
        model: the model after training.
        selection: the selected weights of its backbone.
        backbone: its name in the model; "" if it is the whole model without the ``head``.

    Returns:
        A text table.
    """
    prefix = f"{backbone}." if backbone else ""
    masks = {prefix + name: mask for name, mask in selection.masks(selection.share).items()}
    counts = {"backbone, selected": [0, 0], "backbone, not selected": [0, 0], "all else": [0, 0]}
    for name, parameter in model.named_parameters():
        moved = parameter.detach() != before[name]
        mask = masks.get(name, torch.zeros_like(moved))
        places = {"backbone, selected": mask, "backbone, not selected": ~mask}
        if not name.startswith(prefix) or name.startswith("head."):
            places = {"all else": torch.ones_like(moved)}
        for part, place in places.items():
            counts[part][0] += int(place.sum())
            counts[part][1] += int(moved[place].sum())
    lines = [[part, *numbers] for part, numbers in counts.items()]
    return tabulate(lines, ["weights", "all", "moved"], intfmt=",")
