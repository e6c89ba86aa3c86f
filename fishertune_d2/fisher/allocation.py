"""How a share of the weights is spread over the groups (one kind in one block)."""

from collections.abc import Mapping

import torch
from torch import Tensor

from .score import flat_on_cpu
from .units import Units

ALLOCATIONS = ("global", "layer")


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
        ValueError: if ``allocation`` is unknown.
    """
    if allocation not in ALLOCATIONS:
        raise ValueError(f"unknown allocation {allocation!r}: choose from {', '.join(ALLOCATIONS)}")
    if allocation == "global":
        return scores
    places = {key: torch.zeros(score.shape, dtype=torch.float32) for key, score in scores.items()}
    for members in units.layers.values():
        flat = flat_on_cpu({f"{i}": scores[key][rows] for i, (key, rows) in enumerate(members)})
        place = torch.empty(len(flat), dtype=torch.float32)
        place[flat.argsort(descending=True, stable=True)] = torch.arange(1.0, len(flat) + 1)
        place = torch.where(flat > 0, len(flat) / place, 0.0)
        parts = [places[key][rows] for key, rows in members]
        for part, own in zip(parts, place.split([p.numel() for p in parts]), strict=True):
            part.copy_(own.view_as(part))
    return places
