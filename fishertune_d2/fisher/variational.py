"""Lambda by stochastic gradients on the free energy (Eq. 10 to 14), weights frozen.

The noise is drawn by the local reparametrisation trick (Kingma et al. 2015; Task2Vec uses it to the
same end): instead of weights from N(theta_hat, Lambda^-1), the outputs of each linear layer are
drawn, whose variance is x^2 Lambda^-1. The noise is then independent for each token, not one draw
of the weights for the whole image: the variance of the gradient is far smaller, and what Lambda
converges to leaves out how an image's tokens act together. With one token for each image that is
the same thing.

Shapes: x (B, ..., in), y (B, ..., out), weight (out, in).
"""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from .batch_losses import BatchLosses
from .candidates import Candidate
from .cost import Cost
from .diagonal import require_all_caught, row_ranges
from .free_energy import FreeEnergy
from .linear_calls import LinearCall, LinearCalls
from .processes import sum_over_processes

RESOLUTIONS = ("weight", "row")
_MIN_VARIANCE = 1e-30  # the square root has no gradient at 0
# Far from the optimum the gradient shrinks with every step; Adam's usual 0.999 would remember its
# first size for longer than an estimate lasts, and hardly move.
_BETAS = (0.9, 0.9)


def _noisy_linear(
    variance: Mapping[str, Tensor], sign: float, generator: torch.Generator, call: LinearCall
) -> Tensor:
    """A layer's outputs, drawn: each has the variance that its weights' variances give it."""
    y = F.linear(call.x, call.weight, call.bias)
    spread = y.new_zeros(())
    if call.weight_name is not None:
        spread = spread + F.linear(call.x.square(), variance[call.weight_name])
    for name, outputs in call.bias_names:
        spread = spread + F.pad(variance[name], (outputs.start, y.shape[-1] - outputs.stop))
    noise = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
    return y + sign * noise * (spread + _MIN_VARIANCE).sqrt().to(y.dtype)


class Variational:
    """Learns log Lambda with Adam, one step a batch, two passes a step.

    Starts from deviations of 0.22 tau (Task2Vec's variance: 5 % of the weights'). Memory: four
    numbers per weight, or per output row. Processes make each step together, so two processes do
    what one with batches twice as large does, but for the noise drawn.

    Args:
        candidates: whose Lambda to find.
        free_energy: gamma and tau.
        resolution: one number for each ``"weight"``, or for each output ``"row"`` of a matrix.
        lr: Adam's step on log Lambda, reached at the first batch.
        decay: the step at batch k is ``lr / (1 + decay * k)``, so that the noise of single batches
            averages out.

    Raises:
        ValueError: if ``resolution`` is unknown.
    """

    # Beside the logarithm its gradient and Adam's moments; in a pass the summed gradient, the
    # variance, and that without the rows that are no candidates. By row it is less.
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
        self.candidates = candidates
        self.parameters = {c.name: c.parameter for c in candidates}
        self.rows = row_ranges(candidates)
        self.free_energy = free_energy or FreeEnergy()
        self.resolution = resolution
        self.lr, self.decay = lr, decay
        self.steps = 0
        self._log_precision: dict[str, Tensor] = {}
        self._optimizer: torch.optim.Optimizer | None = None

    def fresh(self) -> "Variational":
        """Another one that has seen nothing, with the same constants."""
        return Variational(self.candidates, self.free_energy, self.resolution, self.lr, self.decay)

    def update(self, losses: BatchLosses) -> None:
        """Makes one step.

        Raises:
            FloatingPointError: if the gradient of Lambda is not finite, with the parameter's name.
        """
        if self._optimizer is None:
            self._start(losses)
        device = next(iter(self.parameters.values())).device
        names, learned = zip(*self._log_precision.items(), strict=True)
        gradients = [torch.zeros_like(each) for each in learned]
        # Antithetic pairs: the loss's slope along the noise, which says nothing of its curvature
        # and is far larger, has the opposite sign in the second pass and cancels.
        for sign in (1.0, -1.0):
            generator = torch.Generator(device).manual_seed(losses.seed)
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
        images = torch.tensor(float(losses.size), device=device)
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
        for group in self._optimizer.param_groups:
            group["lr"] = self.lr / (1 + self.decay * (self.steps - 1))
        self._optimizer.step()

    def _start(self, losses: BatchLosses) -> None:
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
        self._optimizer = torch.optim.Adam(self._log_precision.values(), lr=self.lr, betas=_BETAS)

    def _variance(self, name: str) -> Tensor:
        """Lambda^-1 in the parameter's shape; 0 in rows that are no candidates."""
        parameter = self.parameters[name]
        variance = torch.exp(-self._log_precision[name]).expand(parameter.shape)
        kept = torch.zeros(len(parameter), dtype=variance.dtype, device=variance.device)
        for rows in self.rows[name]:
            kept[rows] = 1.0
        return variance * kept.view(-1, *[1] * (parameter.dim() - 1))

    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; tau^-2 for what is no candidate."""
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

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name (Eq. 14)."""
        return {name: self.free_energy.fisher(value) for name, value in self.precision().items()}
