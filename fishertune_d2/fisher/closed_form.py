"""Lambda in closed form (Eq. 14): the free energy's minimiser, running over the batches."""

from collections.abc import Sequence

from torch import Tensor

from .batch_losses import BatchLosses
from .candidates import Candidate
from .diagonal import Diagonal, add_squares, mean_over_images
from .free_energy import FreeEnergy


class ClosedForm(Diagonal):
    """Lambda = F / gamma + tau^-2 with the running mean F; gives F back by Eq. 14.

    Exact where the loss is quadratic. It ranks as :class:`Diagonal` does, but for what float32
    loses of an F far below gamma * tau^-2: that is what an estimate by way of Lambda can resolve.

    Args:
        candidates: whose Lambda to find.
        free_energy: gamma and tau.
    """

    def __init__(self, candidates: Sequence[Candidate], free_energy: FreeEnergy | None = None):
        super().__init__(candidates)
        self.free_energy = free_energy or FreeEnergy()

    def fresh(self) -> "ClosedForm":
        """Another one that has seen nothing, with the same gamma and tau."""
        return ClosedForm(self.candidates, self.free_energy)

    def update(self, losses: BatchLosses) -> None:
        """Adds a batch; raises as :class:`Diagonal` does."""
        self.images += losses.size
        values = add_squares(self.sums, self.parameters, self.rows, losses)
        self.free_energy.calibrate(self.parameters, self.rows, values)

    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; tau^-2 for what is no candidate."""
        f = mean_over_images(self.sums, self.images)
        return {name: self.free_energy.precision(value) for name, value in f.items()}

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name; sums over processes, so every process must call it."""
        return {name: self.free_energy.fisher(value) for name, value in self.precision().items()}
