"""ChildTuning-D: the weights that matter most for the task, chosen once (Xu et al., EMNLP 2021).

The score is F(x), as in the method ``fisher``. Unlike there, the choice does not grow: a "child" of
the network with a share D_MAX of its weights is chosen before tuning, and all of it trains from the
first step to the last.

Differences from the authors' code, with reasons:

- They square the mean gradient of a batch. The default here squares per image (Eq. 9);
  FISHER.ESTIMATOR batch_mean squares as they do.
- They choose among all parameters named "layer", including norms and the attention's output. Here
  all selecting methods choose among the candidates of Eq. 3, so that a comparison is one of scores
  alone. D_MAX is a share of the whole backbone in both.
- Their mask lets weight decay shrink the weights that were not chosen. Here these do not change by
  a bit.
"""

from detectron2.config import CfgNode

from .fisher_terms import FisherOnly
from .registry import TUNING_REGISTRY, TuningMethod


class ChildTune(FisherOnly):
    """Trains the candidates that matter most for the task, all of them from the first step."""

    schedule = "constant"


@TUNING_REGISTRY.register()
def childtune(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD childtune``."""
    return ChildTune()
