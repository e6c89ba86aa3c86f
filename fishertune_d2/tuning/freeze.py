"""No fine-tuning: the backbone stays frozen, and only the decoder trains."""

from detectron2.config import CfgNode
from torch import nn

from .registry import TUNING_REGISTRY, TuningMethod


class Freeze(TuningMethod):
    """Trains no parameter of the backbone."""

    options = ()

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """No parameter."""
        return {}


@TUNING_REGISTRY.register()
def freeze(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD freeze``."""
    return Freeze()
