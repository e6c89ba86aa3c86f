"""The free energy that the variational estimators minimise (Eq. 10 to 14), and its constants.

    L(Lambda) = E_{theta ~ N(theta_hat, Lambda^-1)}[loss] + gamma * KL(N(theta_hat, Lambda^-1) || p)

with p = N(theta_pretrained, tau^2 I) and a diagonal Lambda. To second order in the deviation the
minimiser is Lambda = F / gamma + tau^-2 (Eq. 14). **Reduction**: the loss is the mean over images,
the KL divergence the sum over weights. Scaling every loss by c and gamma by c leaves Lambda alone.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from .processes import sum_over_processes
from .score import fisher_from_precision, posterior_precision


class FreeEnergy:
    """gamma and tau of Eq. 11, from the first batch where they are not given.

    The paper's text gives neither. gamma decides how far the weights are perturbed: at the optimum
    every weight adds gamma / 2 to the loss, so gamma = 2 * ``loss_share`` * loss / weights lets all
    of them add that share of it. tau caps the deviation of a weight that the loss hardly feels; by
    default at the root mean square of the candidate weights.

    Args:
        gamma: weight of the KL term, in units of the loss; None to derive it.
        tau: standard deviation of the prior, in units of the weights; None to derive it.
        loss_share: see above; only where ``gamma`` is derived.

    Raises:
        ValueError: if a constant is not positive.
    """

    def __init__(
        self, gamma: float | None = None, tau: float | None = None, loss_share: float = 0.03
    ):
        for name, value in {"gamma": gamma, "tau": tau, "loss_share": loss_share}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name} must be positive: got {value}")
        self.gamma = gamma
        self.tau = tau
        self.loss_share = loss_share

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
        """Derives what is not known yet; a second call changes nothing.

        Args:
            parameters: the candidates' parameters by name.
            rows: their candidate rows.
            losses: of the first batch, (B,).
        """
        if self.tau is not None and self.gamma is not None:
            return
        parts = [parameters[name].detach()[part] for name in parameters for part in rows[name]]
        count = sum(part.numel() for part in parts)
        if self.tau is None:
            self.tau = (sum(part.double().square().sum().item() for part in parts) / count) ** 0.5
        if self.gamma is None:
            total = torch.stack([losses.double().sum(), losses.new_tensor(len(losses)).double()])
            sum_over_processes([total])
            loss, images = total.tolist()
            self.gamma = 2 * self.loss_share * abs(loss) / images / count

    def precision(self, f: Tensor) -> Tensor:
        """Lambda of F, the minimiser."""
        return posterior_precision(f, self.gamma, self.prior_precision)

    def fisher(self, precision: Tensor) -> Tensor:
        """F of Lambda, Eq. 14."""
        return fisher_from_precision(precision, self.gamma, self.prior_precision)
