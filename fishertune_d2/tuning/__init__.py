"""Methods that tune a backbone: one file each, one registry.

``MaskedUpdate`` and ``SelectedWeights`` are pure PyTorch and work without Detectron2. The methods
need it, because they are built from its config.
"""

from importlib import import_module
from pkgutil import iter_modules

from fishertune_d2 import compat

from .masked_update import MaskedUpdate, require_same_shapes
from .selected_weights import SelectedWeights

__all__ = [
    "TUNING_REGISTRY",
    "AddingMethod",
    "MaskedUpdate",
    "SelectedWeights",
    "SelectiveMethod",
    "TuningMethod",
    "build_tuning_method",
    "require_same_shapes",
]

if compat.has_detectron2():
    from .registry import (
        TUNING_REGISTRY,
        AddingMethod,
        SelectiveMethod,
        TuningMethod,
        build_tuning_method,
    )

    # A method registers itself when its file is imported, so that a new one needs no line here.
    for _module in iter_modules(__path__):
        import_module(f".{_module.name}", __name__)
else:

    def __getattr__(name: str):
        """Says what is missing when something that needs Detectron2 is asked for."""
        if name in __all__:
            compat.require_detectron2()
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
