"""Lambda by stochastic gradients on the free energy (Eq. 10 to 14), weights frozen.

The local reparametrisation trick draws the noise (Kingma et al. 2015; Task2Vec uses it for the same
purpose): instead of weights from N(theta_hat, Lambda^-1), it draws the outputs of each linear
layer, whose variance is x^2 Lambda^-1. The noise is then independent for each token, where one draw
of the weights would be shared by the whole image. So the variance of the gradient is far smaller,
and the limit of Lambda ignores how an image's tokens act together. With one token for each image
both are equal.

Shapes: x (B, ..., in), y (B, ..., out), weight (out, in).
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_losses import BatchLosses
from ..candidates import Candidate
from ..processes import sum_over_processes
from .diagonal import require_all_caught
from .estimator import Cost
from .free_energy import FreeEnergy, PrecisionEstimator
from .linear_calls import LinearCall, LinearCalls

RESOLUTIONS = ("weight", "row")
_MIN_VARIANCE = 1e-30  # the square root has no gradient at 0
# Far from the optimum the gradient shrinks with every step. Adam's usual 0.999 would remember its
# first size for longer than an estimate lasts, and Lambda would hardly move.
_BETAS = (0.9, 0.9)


def _noisy_linear(
    variance: Mapping[str, Tensor], sign: float, generator: torch.Generator, call: LinearCall
) -> Tensor:
    """Draws a layer's outputs with the variance that follows from its weights' variances."""
    y = call.output()
    spread = y.new_zeros(())
    if call.weight_name is not None:
        spread = spread + F.linear(call.x.square(), variance[call.weight_name])
    for name, outputs in call.bias_names:
        spread = spread + F.pad(variance[name], (outputs.start, y.shape[-1] - outputs.stop))
    noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    return y + sign * noise * (spread + _MIN_VARIANCE).sqrt().to(y.dtype)


class Variational(PrecisionEstimator):
    """Learns log Lambda with Adam: one step for each batch, two passes for each step.

    Starts from deviations of 0.22 tau (Task2Vec's variance: 5 % of the weights'). Processes make
    each step together. Memory: four numbers per weight, or per output row.

    Args:
        candidates: the weights to measure.
        free_energy: gamma and tau; by default derived from the first batch.
        resolution: one number for each ``"weight"``, or for each output ``"row"`` of a matrix.
        lr: Adam's step on log Lambda, at the first batch.
        decay: the step at batch k is ``lr / (1 + decay * k)``, so that the noise of single batches
            averages out.

    Raises:
        ValueError: if ``resolution`` is unknown.
    """

    # Kept: the logarithm, its gradient and Adam's two moments. In a pass: the summed gradient, the
    # variance, and the variance with 0 outside the candidates. By row it is less.
    cost = Cost(kept=4, extra=3, passes=2)

    def __init__(
        self,
        candidates: Sequence[Candidate],
        free_energy: FreeEnergy | None = None,
        resolution: str = "weight",
        lr: float = 0.3,
        decay: float = 0.05,
    ):
        if resolution not in RESOLUTIONS:
            raise ValueError(f"unknown resolution {resolution!r}: choose from {RESOLUTIONS}")
        super().__init__(candidates, free_energy)
        self.resolution = resolution
        self.lr, self.decay = lr, decay

    def reset(self) -> None:
        """Forgets Lambda and Adam's moments."""
        self.steps = 0
        self._log_precision: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def update(self, losses: BatchLosses) -> None:
        """Makes one step.

        Raises:
            FloatingPointError: if the gradient of Lambda is not finite, with the parameter's name.
        """
        optimizer = self._optimizer = self._optimizer or self._start(losses)
        names, learned = zip(*self._log_precision.items(), strict=True)
        gradients = [torch.zeros_like(each) for each in learned]
        # Antithetic pairs: the loss's slope along the noise is far larger than its curvature, but
        # has the opposite sign in the second pass and cancels.
        for sign in (1.0, -1.0):
            generator = torch.Generator(self.device).manual_seed(losses.seed)
            with torch.enable_grad():
                variance = {name: self._variance(name) for name in self.parameters}
                run = partial(_noisy_linear, variance, sign, generator)
                with LinearCalls(self.parameters, run) as calls:
                    values = losses.together()
            require_all_caught(values, self.parameters, calls.seen)
            parts = torch.autograd.grad(
                0.5 * values.sum(), learned, allow_unused=True, materialize_grads=True
            )
            for gradient, part in zip(gradients, parts, strict=True):
                gradient += part
        images = torch.tensor(float(losses.size), device=self.device)
        sum_over_processes([images, *gradients])
        prior = self.free_energy.prior_precision
        for name, gradient in zip(names, gradients, strict=True):
            log_precision = self._log_precision[name]
            # Eq. 11 and 13: d KL / d log Lambda = (1 - tau^-2 / Lambda) / 2, for each weight.
            kl = 0.5 * (1.0 - prior * torch.exp(-log_precision.detach()))
            weights = self.parameters[name].numel() / log_precision.numel()
            log_precision.grad = gradient / images + self.free_energy.gamma * weights * kl
            if not log_precision.grad.isfinite().all():
                raise FloatingPointError(
                    f"the gradient of Lambda of {name} is not finite on {losses.place(0)}"
                )
        self.steps += 1
        for group in optimizer.param_groups:
            group["lr"] = self.lr / (1 + self.decay * (self.steps - 1))
        optimizer.step()

    def _start(self, losses: BatchLosses) -> torch.optim.Optimizer:
        with torch.no_grad():
            self.free_energy.calibrate(self.parameters, self.rows, losses.together())
        start = torch.tensor(20.0 * self.free_energy.prior_precision).log().item()
        for name, parameter in self.parameters.items():
            rows_only = self.resolution == "row" and parameter.dim() == 2
            shape = (len(parameter), 1) if rows_only else parameter.shape
            dtype = torch.promote_types(parameter.dtype, torch.float32)
            self._log_precision[name] = torch.full(
                shape, start, dtype=dtype, device=parameter.device, requires_grad=True
            )
        return torch.optim.Adam(self._log_precision.values(), lr=self.lr, betas=_BETAS)

    def _variance(self, name: str) -> Tensor:
        """Lambda^-1 in the parameter's shape; 0 outside the candidate rows."""
        parameter = self.parameters[name]
        variance = torch.exp(-self._log_precision[name]).expand(parameter.shape)
        kept = torch.zeros(len(parameter), dtype=variance.dtype, device=variance.device)
        for rows in self.rows[name]:
            kept[rows] = 1.0
        return variance * kept.view(-1, *[1] * (parameter.dim() - 1))

    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; tau^-2 where there is no candidate."""
        precision = {}
        for name, log_precision in self._log_precision.items():
            full = torch.full_like(
                self.parameters[name], self.free_energy.prior_precision, dtype=log_precision.dtype
            )
            learned = log_precision.detach().exp().expand(full.shape)
            for rows in self.rows[name]:
                full[rows] = learned[rows]
            precision[name] = full
        return precision
