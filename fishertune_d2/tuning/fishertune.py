"""FisherTune: the weights with the highest domain-related Fisher information."""

from collections.abc import Mapping
from functools import partial

from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.fisher import FisherEstimate, Units, domain_related_fisher
from fishertune_d2.fisher.score import OPTIONS

from .registry import TUNING_REGISTRY, SelectiveMethod, TuningMethod


class FisherTune(SelectiveMethod):
    """Trains the candidates of Eq. 3 that DRF (Eq. 7, 15) ranks highest.

    The arguments are those of :func:`fishertune_d2.fisher.domain_related_fisher`.
    """

    compares_domains = True

    def __init__(self, *, form: str, gamma: float, tau: float, eps: float, rho: float):
        self._drf = partial(
            domain_related_fisher, form=form, gamma=gamma, tau=tau, eps=eps, rho=rho
        )

    def scores(self, backbone: nn.Module, estimate: FisherEstimate) -> Mapping[str, Tensor]:
        """DRF."""
        return self._drf(estimate)

    def unit_scores(
        self, backbone: nn.Module, estimate: FisherEstimate, units: Units
    ) -> Mapping[str, Tensor]:
        """DRF of the means of F(x) and F(x') over each unit."""
        return self.scores(backbone, estimate.by_unit(units))


@TUNING_REGISTRY.register()
def fishertune(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD fishertune``, with the constants in ``cfg.FISHER``."""
    return FisherTune(**{name: cfg.FISHER[name.upper()] for name in OPTIONS})
