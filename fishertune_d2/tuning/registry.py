"""What of the backbone is trained after warm-up: the contract and the registry of methods.

A method is one file: a class, and a function ``name(cfg) -> TuningMethod``, whose name is what
``TUNING.METHOD`` takes.
"""

from collections.abc import Mapping

from detectron2.config import CfgNode
from fvcore.common.registry import Registry
from torch import Tensor, nn

from fishertune_d2.fisher import FisherEstimate

TUNING_REGISTRY = Registry("TUNING")


class TuningMethod:
    """Base class. A subclass says which parameters train, and scores weights if it selects some.

    Attributes:
        selects: whether only the best-scored weights of the parameters move. If so, the trainer
            estimates the Fisher information after warm-up and calls :meth:`scores`.
    """

    selects = False

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The backbone's parameters that the optimizer holds in the tuning stage, by name.

        Args:
            backbone: its ``unused_parameters()`` are not reached by its forward pass and must not
                be among them (DDP would wait for their gradients).
        """
        raise NotImplementedError

    def scores(self, estimate: FisherEstimate) -> Mapping[str, Tensor]:
        """One score for each weight of the parameters; only called if ``selects``."""
        raise NotImplementedError


def build_tuning_method(cfg: CfgNode) -> TuningMethod:
    """The method that ``cfg.TUNING.METHOD`` names.

    Raises:
        KeyError: if there is no such method; names those there are.
    """
    return TUNING_REGISTRY.get(cfg.TUNING.METHOD)(cfg)
