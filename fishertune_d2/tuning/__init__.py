"""Ways to tune a backbone: one file each, one registry."""

from importlib import import_module
from pkgutil import iter_modules

from .masked_update import MaskedUpdate, require_same_shapes
from .registry import TUNING_REGISTRY, SelectiveMethod, TuningMethod, build_tuning_method
from .selected_weights import SelectedWeights

__all__ = [
    "TUNING_REGISTRY",
    "MaskedUpdate",
    "SelectedWeights",
    "SelectiveMethod",
    "TuningMethod",
    "build_tuning_method",
    "require_same_shapes",
]

# A method registers itself when its file is imported, so that a further file needs no line here.
for _module in iter_modules(__path__):
    import_module(f".{_module.name}", __name__)
