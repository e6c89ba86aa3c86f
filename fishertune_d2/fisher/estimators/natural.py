"""Lambda by natural-gradient steps on the free energy (Eq. 11).

For a Gaussian q the natural-gradient step is an exponential average of the curvature at weights
drawn from q: Lambda <- (1 - beta) Lambda + beta (F(theta) / gamma + tau^-2), theta ~ q. F(theta)
comes from squared gradients, as in the Vadam of Khan et al. 2018. (They square the batch's mean
gradient; **reduction** here: the mean of squares per image.) Squares at perturbed weights include
the gradient that the perturbation itself causes. So the fixed point is the closed form only where
the residuals outweigh the perturbation, which a small gamma ensures.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_losses import BatchLosses
from ..candidates import Candidate
from .diagonal import add_squares
from .estimator import Cost, mean_over_images, zeros_like_parameters
from .free_energy import FreeEnergy, PrecisionEstimator
from .linear_calls import LinearCall


class Natural(PrecisionEstimator):
    """An exponential average, which begins as a plain average over the first batches.

    The first batch meets unperturbed weights. Processes make each step together. Memory: three
    numbers per weight, and the perturbed weights during a pass.

    Args:
        candidates: the weights to measure.
        free_energy: gamma and tau; by default derived from the first batch.
        beta: weight of a batch in the average, after the first 1 / beta batches.

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
        super().__init__(candidates, free_energy)
        self.beta = beta

    def reset(self) -> None:
        """Forgets Lambda."""
        self.steps = 0
        self._precision: dict[str, Tensor] = {}

    def update(self, losses: BatchLosses) -> None:
        """Makes one step; raises the errors of :class:`Diagonal`."""
        generator = torch.Generator(self.device).manual_seed(losses.seed)

        def perturbed(call: LinearCall) -> Tensor:
            weight, bias = call.weight, call.bias
            if call.weight_name is not None:
                weight = weight + self._deviation(call.weight_name, generator)
            if bias is not None and call.bias_names:
                bias = bias.clone()
                for name, outputs in call.bias_names:
                    bias[outputs] += self._deviation(name, generator)
            return F.linear(call.x, weight, bias)

        sums = zeros_like_parameters(self.parameters)
        linear = perturbed if self._precision else LinearCall.output
        values = add_squares(self, sums, losses, linear)
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
        """Lambda by parameter name; tau^-2 where there is no candidate."""
        return dict(self._precision)
