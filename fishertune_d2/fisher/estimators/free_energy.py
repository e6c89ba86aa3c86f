"""The free energy (Eq. 10 to 14), its constants, and the base class of its minimisers.

    L(Lambda) = E_{theta ~ N(theta_hat, Lambda^-1)}[loss] + gamma * KL(N(theta_hat, Lambda^-1) || p)

with p = N(theta_pretrained, tau^2 I) and a diagonal Lambda. To second order in the deviation the
minimiser is Lambda = F / gamma + tau^-2 (Eq. 14). **Reduction**: the loss is the mean over images,
the KL divergence the sum over weights. If every loss and gamma are scaled by c, Lambda stays the
same.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ..candidates import Candidate
from ..processes import sum_over_processes
from ..score import fisher_from_precision, posterior_precision
from .estimator import Estimator

_PRIOR_SHARE = 0.01  # gamma * tau^-2 by the mean F


class FreeEnergy:
    """gamma and tau of Eq. 11; the first batch sets a constant that is not given.

    The paper's text gives neither. gamma decides how far the weights are perturbed: at the optimum
    every weight adds gamma / 2 to the loss, so gamma = 2 * ``loss_share`` * loss / weights lets all
    weights together add ``loss_share`` of the loss. tau limits the deviation of weights that hardly
    change the loss; by default it is the root mean square of the candidate weights.

    Args:
        gamma: weight of the KL term, in units of the loss; None to derive it.
        tau: standard deviation of the prior, in units of the weights; None to derive it.
        loss_share: see above; only used where ``gamma`` is derived.

    Raises:
        ValueError: if a constant is not positive.
    """

    def __init__(
        self, gamma: float | None = None, tau: float | None = None, loss_share: float = 0.03
    ):
        for name, value in {"gamma": gamma, "tau": tau, "loss_share": loss_share}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive: got {value}")
        self.loss_share = loss_share
        # None until the first batch.
        self._gamma = gamma
        self._tau = tau

    @property
    def gamma(self) -> float:
        """Weight of the KL term."""
        return _known(self._gamma)

    @property
    def tau(self) -> float:
        """Standard deviation of the prior."""
        return _known(self._tau)

    @property
    def known(self) -> bool:
        """Whether gamma and tau were given or derived."""
        return self._gamma is not None and self._tau is not None

    @property
    def prior_precision(self) -> float:
        """tau^-2."""
        return self.tau**-2

    def calibrate(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Mapping[str, Sequence[slice]],
        losses: Tensor,
    ) -> None:
        """Derives the constants that are not known yet from the first batch's losses, (B,)."""
        if self.known:
            return
        count = self._derive_tau(parameters, rows)
        if self._gamma is None:
            total = torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
            sum_over_processes([total])
            loss, images = total.tolist()
            self._gamma = 2 * self.loss_share * abs(loss) / images / count

    def calibrate_to_fisher(
        self,
        parameters: Mapping[str, nn.Parameter],
        rows: Mapping[str, Sequence[slice]],
        total: float,
    ) -> None:
        """Derives the constants that are not known yet from the sum of F over all weights."""
        count = self._derive_tau(parameters, rows)
        if self._gamma is None:
            mean = max(total / count, torch.finfo(torch.float32).tiny)
            self._gamma = _PRIOR_SHARE * mean * self.tau**2

    def _derive_tau(
        self, parameters: Mapping[str, nn.Parameter], rows: Mapping[str, Sequence[slice]]
    ) -> int:
        """Derives tau if it is not known yet; returns the number of candidate weights."""
        parts = [parameters[name].detach()[part] for name in parameters for part in rows[name]]
        count = sum(part.numel() for part in parts)
        if self._tau is None:
            self._tau = (sum(part.double().square().sum().item() for part in parts) / count) ** 0.5
        return count

    def precision(self, f: Tensor) -> Tensor:
        """Lambda of F, the minimiser."""
        return posterior_precision(f, self.gamma, self.prior_precision)

    def fisher(self, precision: Tensor) -> Tensor:
        """F of Lambda, Eq. 14."""
        return fisher_from_precision(precision, self.gamma, self.prior_precision)


def _known(constant: float | None) -> float:
    assert constant is not None, "every estimator calls calibrate() on its first batch"
    return constant


class PrecisionEstimator(Estimator):
    """Finds Lambda, from which Eq. 14 gives F.

    Two processes find what one finds from batches twice as large, except for random draws.

    Args:
        candidates: the weights to measure.
        free_energy: gamma and tau; by default derived from the first batch.
    """

    def __init__(self, candidates: Sequence[Candidate], free_energy: FreeEnergy | None = None):
        super().__init__(candidates)
        self.free_energy = free_energy or FreeEnergy()

    @abstractmethod
    def precision(self) -> dict[str, Tensor]:
        """Lambda by parameter name; tau^-2 where there is no candidate."""

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name (Eq. 14)."""
        return {name: self.free_energy.fisher(value) for name, value in self.precision().items()}
