"""The selected units: all candidates are ranked once, and every share is a prefix of the ranking.

Therefore the selection of a smaller share is a part of a larger share's, with any schedule: a
selected weight stays selected. A unit is a single weight or a neuron, see :mod:`.units`.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from . import selection_file
from .allocation import allocate, count_of_share
from .candidates import KINDS, groups_of
from .score import best_first, flat_on_cpu
from .selection_file import ends_by_rank
from .units import Units, slices_of


@dataclass(frozen=True, eq=False)
class Slices:
    """The selected slices of one parameter; the entries of a slice are selected together.

    Attributes:
        dim: the dimension of the slices: 0 for rows, 1 for columns; None for single entries of the
            flattened parameter.
        index: which slices, best first; int64 (n,), on the CPU.
        ranks: the ranks of their units, ascending; int64 (n,), on the CPU.
        steps: the factors on the optimizer's steps of their units, (n,); None for 1.
    """

    dim: int | None
    index: Tensor
    ranks: Tensor
    steps: Tensor | None = None


@dataclass
class Selection:
    """The best-scored units, up to a share of ``base``, with their ranks.

    ``print(selection)`` shows a table of them.

    Attributes:
        indices: by group of units, the selected units, best first; int64 of shape (n,), on the CPU.
            A group of single weights is one parameter, and has its name.
        ranks: their ranks among all units of all groups, from 0, ascending; int64 (n,), on the CPU.
        shapes: the shape of each parameter, by name.
        share: the share of the weights that is selected, in [0, 1]; the methods accept smaller ones
            too.
        base: the number of weights that a share refers to.
        notes: how the selection was made, as strings.
        source: the name for it in error messages: the file that it was read from.
        unit: ``"weight"`` or ``"neuron"``.
        steps: by group, a factor on the optimizer's step of each selected unit, float32 (n,), in
            the order of ``indices``, on the CPU; None for 1. See :func:`.steps_of_units`.
    """

    indices: dict[str, Tensor]
    ranks: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    share: float
    base: int
    notes: dict[str, str] = field(default_factory=dict)
    source: str = field(default="the selection", compare=False)
    unit: str = "weight"
    steps: dict[str, Tensor] | None = None

    @classmethod
    def from_scores(
        cls,
        scores: Mapping[str, Tensor],
        share: float,
        base: int,
        units: Units | None = None,
        allocation: str = "global",
    ) -> "Selection":
        """Ranks all units together and keeps the best, with ``share * base`` weights at most.

        The order of the mapping and of the entries breaks ties. Scores of a GPU are ranked on the
        CPU, so the result does not depend on the device. Memory: beside the scores, two copies of
        them in float32 (three for the allocation ``"layer"``), and the selected entries.

        Args:
            scores: one for each unit, by group of ``units`` (:meth:`Units.mean` makes them from
                values by parameter name); not negative; an entry of 0 is never selected.
            share: in [0, 1].
            base: the number of weights that ``share`` refers to (paper: the whole backbone).
            units: what the scores are of; by default of single weights, by parameter name.
            allocation: ``"global"`` or ``"layer"``, see :func:`.allocate`.

        Returns:
            The selection.

        Raises:
            ValueError: if ``share`` is out of range, a score is negative or not finite, or too few
                entries have a score above 0.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be in [0, 1]: got {share}")
        if units is None:
            units = Units("weight", {name: tuple(score.shape) for name, score in scores.items()})
        _require_scores(scores, units)
        flat = flat_on_cpu(allocate(scores, units, allocation)).float()
        names, counts = list(scores), torch.tensor([score.numel() for score in scores.values()])
        sizes = torch.tensor([units.groups[name].size for name in names])
        ends = counts.cumsum(0)
        place = _best_within(flat, share, base, sizes, ends)
        owner = torch.bucketize(place, ends, right=True)
        by_owner = owner.argsort(stable=True)  # stable, so that the ranks of an owner ascend
        parts = by_owner.split(torch.bincount(owner, minlength=len(names)).tolist())
        # Clones, because a view keeps the memory of all parts, and safetensors refuses views.
        ranks = {name: part.clone() for name, part in zip(names, parts, strict=True)}
        starts = (ends - counts).tolist()
        indices = {
            name: place[ranks[name]] - start for name, start in zip(names, starts, strict=True)
        }
        notes = {} if allocation == "global" else {"allocation": allocation}
        return cls(indices, ranks, units.shapes, share, base, notes, unit=units.unit)

    @cached_property
    def units(self) -> Units:
        """All units of the parameters, selected or not."""
        return Units(self.unit, self.shapes)

    def count(self, share: float) -> int:
        """The number of units in a share; refuses a larger share than that of the selection."""
        if share > self.share:
            raise ValueError(f"{self.source} holds a share of {self.share}: got {share}")
        weights = count_of_share(share, self.base)
        return weights if self.unit == "weight" else int((self._ends <= weights).sum())

    def weights(self, share: float) -> int:
        """The number of weights in a share; neurons may fall short of it by a part of one."""
        units = self.count(share)
        return units if self.unit == "weight" or not units else int(self._ends[units - 1])

    @cached_property
    def _ends(self) -> Tensor:
        """For each rank, the number of weights of the units up to it."""
        return ends_by_rank(self.ranks, self.units)

    def slices(self, name: str) -> Slices:
        """The selected slices of one parameter, best first."""
        parts = self.units.parts[name]
        if not parts:
            return Slices(None, *torch.empty(2, 0, dtype=torch.int64))
        index = torch.cat([self.indices[group] + part.start for group, part in parts])
        ranks = torch.cat([self.ranks[group] for group, _ in parts])
        steps = None
        if self.steps is not None:
            steps = torch.cat([self.steps[group] for group, _ in parts])
        if len(parts) == 1:
            return Slices(parts[0][1].dim, index, ranks, steps)
        order = ranks.argsort(stable=True)
        steps = None if steps is None else steps[order]
        return Slices(parts[0][1].dim, index[order], ranks[order], steps)

    def prefix(self, name: str, share: float) -> Tensor:
        """Flat indices of the entries of one parameter within ``share``, best first, (n,)."""
        slices = self.slices(name)
        index = slices.index[: entries_within(slices.ranks, self.count(share))]
        if slices.dim is None:
            return index
        shape = self.shapes[name]
        return slices_of(torch.arange(math.prod(shape)).view(shape), slices.dim)[index].flatten()

    def masks(self, share: float) -> dict[str, Tensor]:
        """A boolean mask of each parameter's shape, True where a weight is within ``share``."""
        masks = {}
        for name, shape in self.shapes.items():
            mask = torch.zeros(shape, dtype=torch.bool)
            mask.view(-1)[self.prefix(name, share)] = True
            masks[name] = mask
        return masks

    def summary(self, share: float | None = None) -> Counter[tuple[str, int]]:
        """The number of weights of each group (kind, block) within ``share`` (default: all)."""
        counts: Counter[tuple[str, int]] = Counter()
        groups = groups_of(self.shapes)
        for name, mask in self.masks(self.share if share is None else share).items():
            for kind, block, rows in groups[name]:
                counts[kind, block] += int(mask[rows].sum())
        return counts

    def group_sizes(self) -> Counter[tuple[str, int]]:
        """The number of weights of each group (kind, block), selected or not."""
        sizes: Counter[tuple[str, int]] = Counter()
        groups = groups_of(self.shapes)
        for name, shape in self.shapes.items():
            for kind, block, rows in groups[name]:
                sizes[kind, block] += (rows.stop - rows.start) * math.prod(shape[1:])
        return sizes

    def table(self, share: float | None = None, *, by_block: bool = False) -> str:
        """A table of counts and shares of each kind within ``share``, by depth thirds or blocks."""
        counts, sizes = self.summary(share), self.group_sizes()
        depth = 1 + max((block for _, block in sizes), default=-1)
        edges = range(depth + 1) if by_block else sorted({i * depth // 3 for i in range(4)})
        parts = [range(*pair) for pair in pairwise(edges)] + [range(depth)]
        names = [f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts[:-1]]
        lines = []
        for name, blocks in zip([*names, "all"], parts, strict=True):
            cells = []
            for kinds in (*((kind,) for kind in KINDS), KINDS):
                groups = [(kind, block) for kind in kinds for block in blocks]
                count, size = (sum(n[g] for g in groups) for n in (counts, sizes))
                cells.append(f"{count:,} ({count / size:.1%})" if size else "-")
            lines.append([name, *cells])
        headers = ["blocks", *KINDS, "all"]
        return tabulate(lines, headers, stralign="right", disable_numparse=True)

    def __str__(self) -> str:
        count = self.weights(self.share)
        heading = f"{count:,} of {self.base:,} weights are selected ({self.share:.2%})"
        return f"{heading}, by kind and depth:\n{self.table()}"

    def save(self, path: str | Path) -> None:
        """Writes the selection as a safetensors file; if that fails, an existing file stays."""
        content = (self.indices, self.ranks, self.shapes, self.share, self.base, self.notes)
        selection_file.write(path, selection_file.Content(*content, self.unit, self.steps))

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Reads a file of :meth:`save`, also from an untrusted source; refuses damaged files."""
        content = selection_file.read(path)
        return cls(**content._asdict(), source=str(path))


def overlap(a: Selection, b: Selection) -> float:
    """Share of the weights selected by ``a`` that ``b`` selects too, in [0, 1]."""
    total = both = 0
    for name in a.shapes:
        own, other = a.prefix(name, a.share), b.prefix(name, b.share)
        total += len(own)
        both += int(torch.isin(own, other, assume_unique=True).sum())
    return both / total if total else 1.0


def entries_within(ranks: Tensor, count: int) -> int:
    """The number of one parameter's ``Selection.ranks`` that are below ``count``."""
    return int(torch.searchsorted(ranks, count))


def _require_scores(scores: Mapping[str, Tensor], units: Units) -> None:
    if scores.keys() != units.groups.keys():
        differing = sorted(scores.keys() ^ units.groups.keys())
        raise ValueError(
            f"the scores are not those of the units {units.unit!r}: {differing[0]} is only in one "
            "of both; Units.mean makes scores of units from scores by parameter name"
        )
    for name, score in scores.items():
        if not bool(((score >= 0) & torch.isfinite(score)).all()):
            raise ValueError(f"the scores of {name} hold negative or non-finite numbers")


def _best_within(flat: Tensor, share: float, base: int, sizes: Tensor, ends: Tensor) -> Tensor:
    """The places of the best units that have ``share * base`` weights at most, best first.

    Args:
        flat: the scores of all units, group by group.
        share: see :meth:`Selection.from_scores`.
        base: likewise.
        sizes: the weights of a unit of each group.
        ends: where each group ends in ``flat``.

    Returns:
        Places in ``flat``, int64 (n,).

    Raises:
        ValueError: if too few weights have a score above 0.
    """
    weights = count_of_share(share, base)
    positive = torch.stack([torch.count_nonzero(part) for part in flat.tensor_split(ends[:-1])])
    available = int((positive * sizes).sum())
    if weights > available:
        raise ValueError(
            f"a share of {share} of {base:,} asks for {weights:,} weights, but only {available:,} "
            "have a score above 0: ask for a smaller share"
        )
    # Units of the smallest size would be the most that fit into the share.
    count = min(weights // int(sizes.min()), int(positive.sum()))
    place = (flat >= _kth_largest(flat, max(count, 1))).nonzero().flatten()
    place = place[best_first(flat[place])[:count]]
    if bool((sizes == 1).all()):
        return place
    return place[sizes[torch.bucketize(place, ends, right=True)].cumsum(0) <= weights]


def _kth_largest(flat: Tensor, k: int) -> float:
    """The k-th largest entry, exactly; ``torch.kthvalue`` takes three times the memory of NumPy."""
    return float(np.partition(flat.numpy(), len(flat) - k)[len(flat) - k])
