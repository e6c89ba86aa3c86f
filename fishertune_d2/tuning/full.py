"""Full fine-tuning: the whole backbone."""

from typing import cast

from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.modeling.vfm import VFMBackbone

from .registry import TUNING_REGISTRY, TuningMethod


class Full(TuningMethod):
    """Trains every parameter that the backbone's forward pass uses."""

    options = ()

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """All parameters, except those that the forward pass does not reach."""
        unused = cast(VFMBackbone, backbone).unused_parameters()
        return {name: p for name, p in backbone.named_parameters() if name not in unused}


@TUNING_REGISTRY.register()
def full(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD full``."""
    return Full()
