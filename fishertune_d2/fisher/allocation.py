"""How many weights a share is, and how it is spread over the groups (one kind in one block)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .score import best_first, flat_on_cpu
from .units import Units

ALLOCATIONS = ("global", "layer")


def count_of_share(share: float, base: int) -> int:
    """The number of weights in a share of ``base``, rounded down."""
    return int(share * base + 1e-6)  # no rounding error may push 0.05 * n below a whole number


def allocate(scores: Mapping[str, Tensor], units: Units, allocation: str) -> Mapping[str, Tensor]:
    """Scores whose one ranking of all units spreads each share as ``allocation`` says.

    Args:
        scores: by group of units, not negative; an entry of 0 is never selected.
        units: their units.
        allocation: ``"global"``, one ranking of all units, as in the paper; ``"layer"``, the same
            share of each kind in each block.

    Returns:
        For ``"layer"`` the number of units in the layer, divided by the place in the layer's own
        ranking: best first, from 1. So each prefix of the ranking of all of them has the same share
        of each layer. On the CPU, in float32.

    Raises:
        ValueError: if ``allocation`` is unknown, or a group is in no layer.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}: choose from {', '.join(ALLOCATIONS)}")
    if allocation == "global":
        return scores
    _require_layers(units)
    places = {key: torch.zeros(score.shape, dtype=torch.float32) for key, score in scores.items()}
    for members in units.layers.values():
        flat = flat_on_cpu({f"{i}": scores[key][rows] for i, (key, rows) in enumerate(members)})
        flat = flat.float()  # as the ranking of all units compares them
        place = torch.empty(len(flat), dtype=torch.float32)
        place[best_first(flat)] = torch.arange(1.0, len(flat) + 1)
        place = torch.where(flat > 0, len(flat) / place, 0.0)
        parts = [places[key][rows] for key, rows in members]
        for part, own in zip(parts, place.split([p.numel() for p in parts]), strict=True):
            part.copy_(own.view_as(part))
    return places


def _require_layers(units: Units) -> None:
    inside = {key for members in units.layers.values() for key, _ in members}
    for key in units.groups:
        if key not in inside:
            raise ValueError(
                f"{key} is in no block, so the allocation 'layer' has no layer for it: choose the "
                "allocation 'global'"
            )
