"""Lambda in closed form (Eq. 14): the minimiser of the free energy, running over the batches."""

from torch import Tensor

from ..batch_losses import BatchLosses
from .diagonal import add_squares
from .estimator import mean_over_images, zeros_like_parameters
from .free_energy import PrecisionEstimator


class ClosedForm(PrecisionEstimator):
    """Lambda = F / gamma + tau^-2 with the running mean F; Eq. 14 gives F back.

    Exact where the loss is quadratic. The ranking is that of :class:`Diagonal`, except that float32
    loses an F far below gamma * tau^-2: an estimate by way of Lambda cannot resolve it.
    """

    def reset(self) -> None:
        """Sets the sums of squares to 0."""
        self.images = 0
        self.sums = zeros_like_parameters(self.parameters)

    def update(self, losses: BatchLosses) -> None:
        """Adds a batch; raises the errors of :class:`Diagonal`."""
        self.images += losses.size
        values = add_squares(self, self.sums, losses)
        self.free_energy.calibrate(self.parameters, self.rows, values)

    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; sums over processes, so every process must call it."""
        f = mean_over_images(self.sums, self.images)
        return {name: self.free_energy.precision(value) for name, value in f.items()}
