"""The base class of all estimators, and the cost that each of them declares."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..batch_losses import BatchLosses
from ..candidates import Candidate
from ..processes import sum_over_processes


@dataclass(frozen=True)
class Cost:
    """The cost of measuring F on one domain, x or x'; the plan of a run reads it.

    All counts are float32 numbers for each weight of the parameters that hold candidates. They
    leave out what an estimator adds to the graph of a pass (``variational`` draws noise).

    Attributes:
        kept: numbers that the estimator keeps from batch to batch.
        extra: further numbers that exist at the end of a forward pass.
        passes: forward and backward passes over each batch.
        images: number of images in a pass; None for the whole batch.
        draws: forward passes without gradients over each batch on x', which draw its shift, if
            the shift is drawn in the model.
    """

    kept: int = 1
    extra: int = 0
    passes: int = 1
    images: int | None = None
    draws: int = 0


class Estimator(ABC):
    """Gathers F over the batches of one domain, x or x'.

    A subclass implements :meth:`reset`, :meth:`update` and :meth:`fisher`.

    Args:
        candidates: the weights to measure.

    Attributes:
        cost: its memory and passes.
        version: grows when the same batches begin to give another F.
        device: the device of the parameters.
        parameters: the parameters that hold candidates, by name.
        rows: the candidate rows of each parameter.
    """

    cost = Cost()
    version = 1

    def __init__(self, candidates: Sequence[Candidate]):
        self.candidates = candidates
        self.parameters = {c.name: c.parameter for c in candidates}
        self.rows = row_ranges(candidates)
        self.device = candidates[0].parameter.device
        self.reset()

    def fresh(self) -> "Estimator":
        """Another estimator with the same options, and the same gamma and tau, but no data."""
        other = copy(self)
        other.reset()
        return other

    @abstractmethod
    def reset(self) -> None:
        """Forgets all batches; the constructor calls it, before it sets a subclass's options."""

    @abstractmethod
    def update(self, losses: BatchLosses) -> None:
        """Adds one batch."""

    @abstractmethod
    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name, over all processes, so far; 0 where there is no candidate.

        It may sum over processes, so every process must call it.
        """


def row_ranges(candidates: Sequence[Candidate]) -> dict[str, list[slice]]:
    """The candidate rows of each parameter, neighbouring ranges joined."""
    ranges: dict[str, list[slice]] = {}
    for candidate in candidates:
        rows, known = candidate.rows, ranges.setdefault(candidate.name, [])
        if known and known[-1].stop == rows.start:
            known[-1] = slice(known[-1].start, rows.stop)
        else:
            known.append(rows)
    return ranges


def zeros_like_parameters(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Zeros in each parameter's shape, in float32 at least."""
    return {
        name: torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32))
        for name, p in parameters.items()
    }


def mean_over_images(sums: Mapping[str, Tensor], images: int) -> dict[str, Tensor]:
    """Divides the sums of all processes by the images of all processes; ``sums`` stay the same."""
    first = next(iter(sums.values()))
    # float64: counts exactly.
    count = torch.tensor(float(images), dtype=torch.float64, device=first.device)
    total = {name: value.clone() for name, value in sums.items()}
    sum_over_processes([count, *total.values()])
    divisor = count.item()
    return {name: value.div_(divisor) for name, value in total.items()}
