"""The diagonal Fisher information, smoothed by what rows and columns have in common."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .candidates import Candidate
from .diagonal import Diagonal


class Smoothed(Diagonal):
    """Each matrix half-way, on a log scale, between its squares and their rank-one fit.

    The mean square of one weight over a few dozen images is mostly noise; those of its whole row
    (an output's gradients) and column (an input's values) are not. The fit is row mean * column
    mean / mean, as Adafactor keeps second moments (Shazeer and Stern 2018); Q, K and V of a fused
    matrix are fitted one by one. With many images it keeps a bias towards the fit, so
    :class:`Diagonal` is the one to take where images are no matter. Biases, and entries that are
    0, stay as they are.

    Args:
        candidates: whose squares to sum.
        weight: of the fit, in [0, 1]; 0 is :class:`Diagonal`.

    Raises:
        ValueError: if ``weight`` is out of range.
    """

    def __init__(self, candidates: Sequence[Candidate], weight: float = 0.5):
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight must be in [0, 1]: got {weight}")
        super().__init__(candidates)
        self.weight = weight

    def fresh(self) -> "Smoothed":
        """Another one that has seen nothing, with the same weight."""
        return Smoothed(self.candidates, self.weight)

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name; sums over processes, so every process must call it."""
        f = super().fisher()
        for candidate in self.candidates:
            part = f[candidate.name][candidate.rows]
            if part.dim() == 2:
                f[candidate.name][candidate.rows] = _towards_rank_one(part, self.weight)
        return f


def _towards_rank_one(f: Tensor, weight: float) -> Tensor:
    mean = f.mean().clamp_min(torch.finfo(f.dtype).tiny)  # where all is 0, the fit is 0
    fit = f.mean(1, keepdim=True) * (f.mean(0, keepdim=True) / mean)
    return f.pow(1 - weight) * fit.pow(weight)
