"""Steps of the optimizer that shrink with the sensitivity of a unit.

Adam moves every weight by about its learning rate, however much the loss depends on the weight. A
step in proportion to F^(-1/2) changes the loss about equally through every unit: to second order,
a step s of a weight changes it by F s^2 / 2.

The first steps of a weight that joins a growing share are about three times the learning rate, and
up to six times, because its moments start at 0 when Adam's correction for that is over
(docs/results/tables.md measures that this matters little).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from .selection import Selection

STEPS = ("equal", "fisher")


def steps_of_units(f: Mapping[str, Tensor], selection: Selection) -> dict[str, Tensor]:
    """A factor on the steps of each selected unit, F^(-1/2) with a mean of 1 over the weights.

    Args:
        f: F(x) by parameter name.
        selection: the selected units.

    Returns:
        ``Selection.steps``: by group of units, float32 (n,), in the order of ``indices``, on the
        CPU. A unit with F = 0 gets the factor of the smallest F above 0.
    """
    means = {name: f.detach().float().cpu() for name, f in selection.units.mean(f).items()}
    chosen = {name: means[name].flatten()[index] for name, index in selection.indices.items()}
    positive = torch.cat([value[value > 0] for value in chosen.values()])
    if not len(positive):
        return {name: torch.ones(len(index)) for name, index in selection.indices.items()}
    smallest = positive.min()
    factors = {name: value.clamp_min(smallest).rsqrt() for name, value in chosen.items()}
    sizes = {name: selection.units.groups[name].size for name in chosen}
    total = sum(float(factor.double().sum()) * sizes[name] for name, factor in factors.items())
    weights = sum(len(factor) * sizes[name] for name, factor in factors.items())
    return {name: factor * (weights / total) for name, factor in factors.items()}
