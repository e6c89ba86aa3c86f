"""Lambda by stochastic natural-gradient steps on the free energy (Eq. 10 to 14), weights frozen.

**Gradient.** For a Gaussian q, the gradient of E_q[loss] with respect to Lambda^-1 is half of
E_q[curvature] (Price's theorem), and Eq. 12 writes F for the curvature. So each batch gives
F(theta) at a theta drawn from q, from squares of per-image gradients, as in VOGN (Khan et al.
2018). :mod:`.pathwise` differentiates the reparametrised draw itself, without Eq. 12.

**Step size.** The natural-gradient step is Lambda <- Lambda + rho * (F(theta) / gamma + tau^-2 -
Lambda), and Newton's step on Lambda^-1 is the same for rho = 1. With rho = 1 / k at batch k, all
batches weigh the same, so that the noise of Lambda falls as 1 / k, as fast as that of a mean. No
rate has to be chosen, and Eq. 14 of Lambda is the mean of F(theta).

**Start.** The first batches meet unperturbed weights, so Lambda starts from their closed form. A
start from one batch would perturb those weights too much whose F happened to be small in it.

The local reparametrisation trick draws theta (Kingma et al. 2015; Task2Vec uses it for the same
purpose): instead of weights from N(theta_hat, Lambda^-1), it draws the outputs of each linear
layer, whose variance is x^2 Lambda^-1, independently for each token.

Shapes: x (B, ..., in), y (B, ..., out), weight (out, in).
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ..batch_losses import BatchLosses
from ..candidates import Candidate
from ..processes import sum_over_processes
from ..units import Units
from .diagonal import add_squares
from .estimator import Cost, mean_over_images, zeros_like_parameters
from .free_energy import FreeEnergy, PrecisionEstimator
from .linear_calls import LinearCall

RESOLUTIONS = ("weight", "row", "neuron")
_MIN_VARIANCE = 1e-30  # the square root has no gradient at 0


def noisy_linear(
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
    """Learns Lambda with one natural-gradient step of size 1 / k at batch k.

    Each process draws from the Lambda of its own batches, and only the last one is that of all. So
    processes exchange F once, at the end. Memory: the sums, and the variances during a pass.

    Args:
        candidates: the weights to measure.
        free_energy: gamma and tau. By default tau is the root mean square of the weights, and gamma
            follows from the start: gamma * tau^-2 is a hundredth of the mean F, as in the score
            ``balanced``. So the prior decides only on weights of a far smaller F, and the draws
            hardly change the loss.
        resolution: one number for each ``"weight"``, for each output ``"row"`` of a matrix, or for
            each ``"neuron"`` (see :class:`.Units`), where each bias of fc2 keeps its own.
        start: the number of first batches, in each process, whose closed form is the start.

    Raises:
        ValueError: if ``resolution`` is unknown, or ``start`` is below 1.
    """

    cost = Cost(extra=1)  # the variances
    version = 2  # before, Adam learned log Lambda from a constant start

    def __init__(
        self,
        candidates: Sequence[Candidate],
        free_energy: FreeEnergy | None = None,
        resolution: str = "weight",
        start: int = 10,
    ):
        if resolution not in RESOLUTIONS:
            raise ValueError(f"unknown resolution {resolution!r}: choose from {RESOLUTIONS}")
        if start < 1:
            raise ValueError(f"start must be at least 1 batch: got {start}")
        super().__init__(candidates, free_energy)
        self.resolution = resolution
        if resolution == "neuron":
            shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
            self.units = Units("neuron", shapes)
        self.start = start

    def reset(self) -> None:
        """Forgets all batches."""
        self.steps = self.images = 0
        self.sums = zeros_like_parameters(self.parameters)

    def update(self, losses: BatchLosses) -> None:
        """Makes one step; raises the errors of :class:`Diagonal`."""
        if self.steps < self.start:
            add_squares(self, self.sums, losses)
        else:
            self._calibrate()
            self._add_curvature(losses)
        self.steps += 1
        self.images += losses.size

    def _add_curvature(self, losses: BatchLosses) -> None:
        """Adds each image's curvature at drawn weights to the sums."""
        add_squares(self, self.sums, losses, self._drawing(self._variances(), 1.0, losses))

    def _drawing(
        self, variances: Mapping[str, Tensor], sign: float, losses: BatchLosses
    ) -> partial[Tensor]:
        # The seed of the batch: both signs, and x and x', see the same noise.
        generator = torch.Generator(self.device).manual_seed(losses.seed)
        return partial(noisy_linear, variances, sign, generator)

    def _variances(self) -> dict[str, Tensor]:
        """Lambda^-1 so far, in the parameters' shapes; 0 outside the candidate rows."""
        variances = zeros_like_parameters(self.parameters)
        for name, f in self._resolved(self.sums, self.images):
            for rows in self.rows[name]:
                variances[name][rows] = self.free_energy.precision(f[rows]).reciprocal()
        return variances

    def _resolved(self, sums: Mapping[str, Tensor], images: int) -> Iterator[tuple[str, Tensor]]:
        """F, or its mean over a row or neuron, at least 0 (so that Lambda is at least tau^-2)."""
        means = {}
        if self.resolution == "neuron":
            means = self.units.spread(self.units.mean(sums))
            means = {name: value for name, value in means.items() if self.units.parts[name]}
        for name, total in sums.items():
            f = means.pop(name, total) / images
            if self.resolution == "row" and f.dim() == 2:
                f = f.mean(1, keepdim=True).expand(f.shape)
            yield name, f.clamp_min(0.0)

    def _calibrate(self) -> None:
        """Derives unknown constants from the batches so far; every process must call it."""
        if self.free_energy.known:
            return
        total = torch.stack([value.sum(dtype=torch.float64) for value in self.sums.values()]).sum()
        sums = torch.stack([total, total.new_tensor(float(self.images))])
        sum_over_processes([sums])
        f, images = sums.tolist()
        self.free_energy.calibrate_to_fisher(self.parameters, self.rows, f / images)

    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; sums over processes, so every process must call it."""
        self._calibrate()
        return {name: self.free_energy.precision(value) for name, value in self.fisher().items()}

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name; sums over processes, so every process must call it."""
        # Eq. 14 solved for F; by way of Lambda, float32 would lose an F far below gamma * tau^-2.
        return dict(self._resolved(mean_over_images(self.sums, self.images), 1))
