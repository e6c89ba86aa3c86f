"""ChildTuning-D: the weights that matter most for the task, chosen once (Xu et al., EMNLP 2021).

The score is F(x), as ``fisher`` has it. What makes it ChildTuning is that the choice does not grow:
a "child" of the network, of D_MAX of its weights, is found before tuning and trained from the first
step to the last.

Where this differs from the authors' code, and why:

- They square the mean gradient of a batch. Squares per image are Eq. 9, and the default;
  FISHER.ESTIMATOR batch_mean squares as they do.
- They choose among all parameters named "layer", norms and the attention's output included. Here
  every method that selects chooses among the candidates of Eq. 3, so that scores are compared, not
  what they range over. D_MAX is a share of the whole backbone all the same.
- Their mask lets weight decay shrink what was not chosen. Here that stays as it is, to the bit.
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
