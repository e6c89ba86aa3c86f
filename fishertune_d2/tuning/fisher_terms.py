"""Each term of DRF alone: F(x), or dF (two methods of Table 4)."""

from collections.abc import Mapping

from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.fisher import FisherEstimate, Units, relative_change

from .registry import TUNING_REGISTRY, SelectiveMethod, TuningMethod


class FisherOnly(SelectiveMethod):
    """Trains the candidates that matter most for the task, and ignores the shift."""

    def scores(self, backbone: nn.Module, estimate: FisherEstimate) -> Mapping[str, Tensor]:
        """F(x), Eq. 4."""
        return estimate.f


class ChangeOnly(SelectiveMethod):
    """Trains the candidates whose F changes most under the shift, and ignores F itself.

    Args:
        eps: guard of the ratio in Eq. 5.
    """

    compares_domains = True

    def __init__(self, eps: float):
        self.eps = eps

    def scores(self, backbone: nn.Module, estimate: FisherEstimate) -> Mapping[str, Tensor]:
        """DF, Eq. 5."""
        return relative_change(estimate.f, estimate.shifted, self.eps)

    def unit_scores(
        self, backbone: nn.Module, estimate: FisherEstimate, units: Units
    ) -> Mapping[str, Tensor]:
        """DF of the means of F(x) and F(x') over each unit."""
        return self.scores(backbone, estimate.by_unit(units))


@TUNING_REGISTRY.register()
def fisher(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD fisher``."""
    return FisherOnly()


@TUNING_REGISTRY.register()
def delta_fisher(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD delta_fisher``."""
    return ChangeOnly(cfg.FISHER.EPS)
