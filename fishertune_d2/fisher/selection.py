"""The ranked choice of weights: all candidates ranked once, so that every share is a prefix.

A smaller share's selection is contained in a larger one's, whatever the schedule, because both are
read off one ranking: a weight that was selected stays selected.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .candidates import groups_of

_FORMAT = "fishertune_selection_v1"


@dataclass
class Selection:
    """The best-scored weights, up to a share of ``base``, with their ranks.

    Attributes:
        indices: by parameter name, the selected entries of the flattened parameter, best first;
            int64 of shape (n,).
        ranks: their ranks among all candidates of all parameters, from 0, ascending; int64 (n,).
        shapes: by parameter name, the parameter's shape.
        share: the largest share that can be asked for, in [0, 1].
        base: number of parameters that a share is a share of.
        notes: what else should travel with the choice (how it was made), as strings.
    """

    indices: dict[str, Tensor]
    ranks: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    share: float
    base: int
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_scores(cls, scores: Mapping[str, Tensor], share: float, base: int) -> "Selection":
        """Ranks all scores together and keeps the best ``share * base``.

        Ties are broken by the order of the mapping and of the entries, so the result does not
        depend on the device. Beside the scores, memory is needed only for what is selected and
        for one tensor at a time.

        Args:
            scores: by parameter name; not negative; an entry of 0 is never selected.
            share: in [0, 1].
            base: number of parameters that ``share`` is a share of (paper: the whole backbone).

        Raises:
            ValueError: if ``share`` is out of range, a score is negative or not finite, or fewer
                entries than asked for have a score above 0.
        """
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"share must be in [0, 1]: got {share}")
        for name, score in scores.items():
            if not bool(((score >= 0) & torch.isfinite(score)).all()):
                raise ValueError(f"the scores of {name} hold negative or non-finite numbers")
        count = count_of_share(share, base)
        positive = sum(torch.count_nonzero(score).item() for score in scores.values())
        if count > positive:
            raise ValueError(
                f"a share of {share} of {base:,} asks for {count:,} weights, but only {positive:,} "
                "have a score above 0: ask for a smaller share"
            )
        names = list(scores)
        threshold = _kth_largest([scores[name] for name in names], count)
        owners, places, values = [], [], []
        for owner, name in enumerate(names):
            flat = scores[name].flatten()
            place = torch.nonzero((flat >= threshold) & (flat > 0)).flatten()
            owners.append(torch.full_like(place, owner))
            places.append(place)
            values.append(flat[place])
        owner, place, value = torch.cat(owners), torch.cat(places), torch.cat(values)
        order = value.argsort(descending=True, stable=True)[:count]
        owner, place = owner[order], place[order]
        indices, ranks = {}, {}
        for i, name in enumerate(names):
            ranks[name] = torch.nonzero(owner == i).flatten()
            indices[name] = place[ranks[name]]
        shapes = {name: tuple(scores[name].shape) for name in names}
        return cls(indices, ranks, shapes, share, base)

    def count(self, share: float) -> int:
        """How many weights ``share`` selects.

        Raises:
            ValueError: if that is more than the selection holds.
        """
        if share > self.share:
            raise ValueError(f"the selection holds a share of {self.share}: got {share}")
        return count_of_share(share, self.base)

    def prefix(self, name: str, share: float) -> Tensor:
        """Flat indices of the entries of one parameter that are within ``share``; (n,)."""
        end = torch.searchsorted(self.ranks[name], self.count(share))
        return self.indices[name][:end]

    def masks(self, share: float) -> dict[str, Tensor]:
        """Boolean masks of the parameters' shapes, True where a weight is within ``share``."""
        masks = {}
        for name, shape in self.shapes.items():
            mask = torch.zeros(shape, dtype=torch.bool, device=self.indices[name].device)
            mask.view(-1)[self.prefix(name, share)] = True
            masks[name] = mask
        return masks

    def summary(self, share: float | None = None) -> dict[tuple[str, int], int]:
        """How many weights of each group (kind, block) are within ``share`` (default: all)."""
        counts: dict[tuple[str, int], int] = {}
        for name, mask in self.masks(self.share if share is None else share).items():
            for kind, block, rows in groups_of(name, len(mask)):
                counts[kind, block] = counts.get((kind, block), 0) + int(mask[rows].sum())
        return counts

    def save(self, path: str | Path) -> None:
        """Writes the selection as a safetensors file."""
        tensors = {f"indices/{name}": t.cpu().contiguous() for name, t in self.indices.items()}
        tensors |= {f"ranks/{name}": t.cpu().contiguous() for name, t in self.ranks.items()}
        header = {"share": self.share, "base": self.base, "shapes": self.shapes}
        texts = {"header": json.dumps(header), "notes": json.dumps(self.notes)}
        save_file(tensors, str(path), metadata={"format": _FORMAT, **texts})

    @classmethod
    def load(cls, path: str | Path) -> "Selection":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(f"{path} is no {_FORMAT} file: its format is {metadata}")
            header = json.loads(metadata["header"])
            shapes = {name: tuple(shape) for name, shape in header["shapes"].items()}
            indices = {name: file.get_tensor(f"indices/{name}") for name in shapes}
            ranks = {name: file.get_tensor(f"ranks/{name}") for name in shapes}
        notes = json.loads(metadata["notes"])
        return cls(indices, ranks, shapes, header["share"], header["base"], notes)


def overlap(a: Selection, b: Selection) -> float:
    """Share of the weights selected by ``a`` that ``b`` selects too, in [0, 1]."""
    total = sum(len(places) for places in a.indices.values())
    both = sum(
        int(torch.isin(places, b.indices[name], assume_unique=True).sum())
        for name, places in a.indices.items()
    )
    return both / total if total else 1.0


def count_of_share(share: float, base: int) -> int:
    """Whole number of weights in a share of ``base``, rounded down."""
    return int(share * base + 1e-6)  # 0.05 * n must not fall below a whole number by a rounding


def _kth_largest(scores: Sequence[Tensor], k: int) -> float:
    """The k-th largest of all entries, exactly, for scores that are not negative.

    Floats of one sign sort as their bit patterns do, so a bisection over the 31 bits finds the
    value by counting alone: no size limit as ``torch.quantile`` has, and no second copy.
    """
    low, high = 0, 0x7F800000  # the bit patterns of 0.0 and infinity
    bits = [score.contiguous().view(torch.int32) for score in map(Tensor.float, scores)]
    while high - low > 1:
        middle = (low + high) // 2
        at_least = sum(int((b >= middle).sum()) for b in bits)
        if at_least >= k:
            low = middle
        else:
            high = middle
    return torch.tensor(low, dtype=torch.int32).view(torch.float32).item()
