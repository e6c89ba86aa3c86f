"""Units: the things that a selection ranks, single weights or whole neurons.

A neuron is a part of a backbone that works as a whole: an output row of Q, K or V (one channel of
one head) with its bias, or a hidden neuron of the feed-forward network, with its row of fc1 (both
rows of a gated one), the bias of that row, and its column of fc2. Biases of fc2 are in no neuron.
All neurons of a ConvNeXt are hidden ones, those between the pointwise layers of a block.

All units of a group have the same size. A neuron's score comes from the means over its weights, so
that large and small neurons compare.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .candidates import block_path, groups_of

UNITS = ("weight", "neuron")


class Part(NamedTuple):
    """Slices of one parameter, one for each unit of a group.

    Attributes:
        name: the parameter's name.
        dim: the dimension of the slices: 0 for rows, 1 for columns; None for single entries of the
            flattened parameter.
        start: the slice of the group's first unit; the others follow in order.
    """

    name: str
    dim: int | None
    start: int


@dataclass
class UnitGroup:
    """Units of one kind in one place.

    Attributes:
        count: the number of units.
        parts: the slices that make up the units.
        size: the number of weights in a unit.
    """

    count: int
    parts: list[Part] = field(default_factory=list)
    size: int = 0


class Units:
    """All units of some parameters.

    Args:
        unit: ``"weight"`` or ``"neuron"``.
        shapes: the shape of each parameter, by name.

    Attributes:
        groups: the groups of units by name. A group of weights is one parameter and has its name;
            a group of neurons is one kind in one block, such as ``"blocks.3.K"``.

    Raises:
        ValueError: if ``unit`` is unknown, no parameter belongs to a neuron, or the parameters of a
            group do not fit together.
    """

    def __init__(self, unit: str, shapes: Mapping[str, tuple[int, ...]]):
        if unit not in UNITS:
            raise ValueError(f"unknown unit {unit!r}: choose from {', '.join(UNITS)}")
        self.unit = unit
        self.shapes = dict(shapes)
        self.groups = self._weights() if unit == "weight" else self._neurons()

    @cached_property
    def parts(self) -> dict[str, list[tuple[str, Part]]]:
        """The parts of each parameter, each with the name of its group; none for some."""
        found: dict[str, list[tuple[str, Part]]] = {name: [] for name in self.shapes}
        for key, group in self.groups.items():
            for part in group.parts:
                found[part.name].append((key, part))
        return found

    @cached_property
    def layers(self) -> dict[tuple[str, int], list[tuple[str, slice]]]:
        """The groups of Eq. 3, one kind in one block: names of unit groups, and rows in them.

        The rows are those of a parameter where units are weights, and all units otherwise. A
        parameter outside the blocks is in no layer.
        """
        found: dict[tuple[str, int], list[tuple[str, slice]]] = {}
        groups = groups_of(self.shapes)
        for key, group in self.groups.items():
            first = group.parts[0]
            for kind, block, rows in groups[first.name]:
                if self.unit == "weight":
                    found.setdefault((kind, block), []).append((key, rows))
                elif rows.start <= first.start < rows.stop:
                    found.setdefault((kind, block), []).append((key, slice(None)))
        return found

    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The mean of each unit's weights.

        Args:
            values: by parameter name, in the parameters' shapes.

        Returns:
            By group, (units,); for weights the values themselves, in the parameters' shapes.
        """
        if self.unit == "weight":
            return {name: value for name, value in values.items() if name in self.shapes}
        means = {}
        for key, group in self.groups.items():
            sums = [
                slices_of(values[part.name], part.dim)[part.start : part.start + group.count]
                for part in group.parts
            ]
            total = torch.stack([each.reshape(group.count, -1).sum(1) for each in sums]).sum(0)
            means[key] = total / group.size
        return means

    def spread(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gives each weight the value of its unit, the reverse of :meth:`mean`.

        Args:
            values: by group, (units,); for weights in the parameters' shapes.

        Returns:
            By parameter name, in the parameters' shapes; 0 for weights of no unit.
        """
        if self.unit == "weight":
            return dict(values)
        like = next(iter(values.values()))
        spread = {name: like.new_zeros(shape) for name, shape in self.shapes.items()}
        for key, group in self.groups.items():
            for part in group.parts:
                slices = slices_of(spread[part.name], part.dim)
                slices = slices[part.start : part.start + group.count]
                slices.copy_(values[key].view(-1, *[1] * (slices.dim() - 1)).expand_as(slices))
        return spread

    def _weights(self) -> dict[str, UnitGroup]:
        return {
            name: UnitGroup(prod(shape), [Part(name, None, 0)], 1)
            for name, shape in self.shapes.items()
        }

    def _neurons(self) -> dict[str, UnitGroup]:
        groups: dict[str, UnitGroup] = {}
        own = groups_of(self.shapes)
        for name, shape in self.shapes.items():
            for kind, _, rows in own[name]:
                count, parts = rows.stop - rows.start, [Part(name, 0, rows.start)]
                if kind == "FFN":
                    count = _hidden_neurons(name, self.shapes)
                    parts = _parts_of_ffn(name, shape, count)
                key = f"{block_path(name)}.{kind}"
                group = groups.setdefault(key, UnitGroup(count))
                if group.count != count:
                    raise ValueError(
                        f"{name} has {count} neurons, but other parameters of {key} have "
                        f"{group.count}: choose the unit 'weight'"
                    )
                group.parts += parts
                group.size += sum(prod(shape) // shape[part.dim or 0] for part in parts)
        if not groups:
            raise ValueError(
                "no parameter is named blocks.<i>.attn.* or blocks.<i>.mlp.*, so there are no "
                "neurons: choose the unit 'weight'"
            )
        return groups


def slices_of(tensor: Tensor, dim: int | None) -> Tensor:
    """A view of a contiguous tensor whose first dimension counts its slices along ``dim``."""
    return tensor.view(-1) if dim is None else tensor.movedim(dim, 0)


def _hidden_neurons(name: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The number of hidden neurons of the feed-forward network that a parameter belongs to."""
    fc2 = f"{name.rpartition('.mlp.')[0]}.mlp.fc2.weight"
    if len(shapes.get(fc2, ())) != 2:
        raise ValueError(
            f"{fc2} is no matrix, so the hidden neurons of {name} are unknown: choose the unit "
            "'weight'"
        )
    return shapes[fc2][1]


def _parts_of_ffn(name: str, shape: tuple[int, ...], hidden: int) -> list[Part]:
    """The slices of hidden neurons in a parameter of a feed-forward network."""
    layer = name.rpartition(".mlp.")[2]
    if layer == "fc2.weight":
        return [Part(name, 1, 0)]
    if layer.startswith("fc2."):
        return []
    if shape[0] % hidden:
        raise ValueError(f"{name} has {shape[0]} rows, which are not those of {hidden} neurons")
    # A gated layer may have both rows of a neuron in one matrix.
    return [Part(name, 0, start) for start in range(0, shape[0], hidden)]
