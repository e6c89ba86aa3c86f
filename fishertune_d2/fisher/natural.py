"""Lambda by natural-gradient steps on the free energy (Eq. 11).

For a Gaussian q the natural-gradient step is an exponential average of the curvature at weights
drawn from q: Lambda <- (1 - beta) Lambda + beta (F(theta) / gamma + tau^-2), theta ~ q, with
F(theta) from squared gradients, as in the Vadam of Khan et al. 2018 (there the square of the
batch's mean gradient; here the mean of squares per image). Squares at perturbed weights also hold
the gradient that the perturbation itself causes, so the fixed point is the closed form where the
residuals outweigh the perturbation, that is for a small gamma.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch_losses import BatchLosses
from .candidates import Candidate
from .cost import Cost
from .diagonal import add_squares, mean_over_images, row_ranges, zeros_like_parameters
from .free_energy import FreeEnergy
from .linear_calls import LinearCall


class Natural:
    """The exponential average, from a plain average over the first batches.

    The first batch is seen with unperturbed weights. Memory: three numbers per weight, and the
    perturbed weights during a pass. Processes make each step together, so two processes do what
    one with batches twice as large does, but for the perturbations drawn.

    Args:
        candidates: whose Lambda to find.
        free_energy: gamma and tau.
        beta: weight of a batch in the average, once 1 / beta batches were seen.

    Raises:
        ValueError: if ``beta`` is out of (0, 1].
    """

    cost = Cost(extra=2)  # the batch's squares, the perturbed weights

    def __init__(
        self,
        candidates: Sequence[Candidate],
        free_energy: FreeEnergy | None = None,
        beta: float = 0.02,
    ):
        if not 0.0 < beta <= 1.0:
            raise ValueError(f"beta must be in (0, 1]: got {beta}")
        self.candidates = candidates
        self.parameters = {c.name: c.parameter for c in candidates}
        self.rows = row_ranges(candidates)
        self.free_energy = free_energy or FreeEnergy()
        self.beta = beta
        self.steps = 0
        self._precision: dict[str, Tensor] = {}

    def fresh(self) -> "Natural":
        """Another one that has seen nothing, with the same constants."""
        return Natural(self.candidates, self.free_energy, self.beta)

    def update(self, losses: BatchLosses) -> None:
        """Makes one step; raises as :class:`Diagonal` does."""
        device = next(iter(self.parameters.values())).device
        generator = torch.Generator(device).manual_seed(losses.seed)

        def perturbed(call: LinearCall) -> Tensor:
            weight, bias = call.weight, call.bias
            if call.weight_name is not None:
                weight = weight + self._deviation(call.weight_name, generator)
            for name, outputs in call.bias_names:
                bias = bias.clone()
                bias[outputs] += self._deviation(name, generator)
            return F.linear(call.x, weight, bias)

        sums = zeros_like_parameters(self.parameters)
        linear = perturbed if self._precision else None
        values = add_squares(sums, self.parameters, self.rows, losses, linear)
        self.free_energy.calibrate(self.parameters, self.rows, values)
        f = mean_over_images(sums, losses.size)
        self.steps += 1
        weight = max(self.beta, 1 / self.steps)
        for name, value in f.items():
            target = self.free_energy.precision(value)
            self._precision[name] = torch.lerp(self._precision.get(name, target), target, weight)

    def _deviation(self, name: str, generator: torch.Generator) -> Tensor:
        precision = self._precision[name]
        noise = torch.randn(
            precision.shape, generator=generator, device=precision.device, dtype=precision.dtype
        )
        deviation = torch.zeros_like(noise)
        for rows in self.rows[name]:
            deviation[rows] = noise[rows] * precision[rows].rsqrt()
        return deviation.to(self.parameters[name].dtype)

    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; tau^-2 for what is no candidate."""
        return dict(self._precision)

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name (Eq. 14)."""
        return {name: self.free_energy.fisher(value) for name, value in self._precision.items()}
