"""Ways to tune a backbone: one file each, one registry."""

from . import fishertune, freeze, full  # noqa: F401 - importing registers them
from .masked_update import MaskedUpdate
from .registry import TUNING_REGISTRY, TuningMethod, build_tuning_method

__all__ = ["TUNING_REGISTRY", "MaskedUpdate", "TuningMethod", "build_tuning_method"]
