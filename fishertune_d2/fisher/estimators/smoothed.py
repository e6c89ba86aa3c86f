"""The diagonal Fisher information, smoothed towards the pattern of its rows and columns."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..candidates import Candidate
from .diagonal import Diagonal


class Smoothed(Diagonal):
    """Each matrix half-way, on a log scale, between its squares and their rank-one fit.

    Over a few dozen images, the mean square of one weight is mostly noise. The means of its whole
    row (an output's gradients) and column (an input's values) are not. The fit is row mean * column
    mean / mean, as Adafactor keeps second moments (Shazeer and Stern 2018); Q, K and V of a fused
    matrix are fitted one by one. With many images a bias towards the fit remains, so prefer
    :class:`Diagonal` where images are plentiful. Biases and entries of 0 stay unchanged.

    Args:
        candidates: the weights to measure.
        weight: weight of the fit, in [0, 1]; 0 is :class:`Diagonal`.

    Raises:
        ValueError: if ``weight`` is out of range.
    """

    def __init__(self, candidates: Sequence[Candidate], weight: float = 0.5):
        if not 0.0 <= weight <= 1.0:
            raise ValueError(f"weight must be in [0, 1]: got {weight}")
        super().__init__(candidates)
        self.weight = weight

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name; sums over processes, so every process must call it."""
        f = super().fisher()
        for candidate in self.candidates:
            part = f[candidate.name][candidate.rows]
            if part.dim() == 2:
                f[candidate.name][candidate.rows] = _towards_rank_one(part, self.weight)
        return f


def _towards_rank_one(f: Tensor, weight: float) -> Tensor:
    mean = f.mean().clamp_min(torch.finfo(f.dtype).tiny)  # the fit of zeros is 0, not NaN
    fit = f.mean(1, keepdim=True) * (f.mean(0, keepdim=True) / mean)
    return f.pow(1 - weight) * fit.pow(weight)
