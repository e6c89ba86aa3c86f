"""Ways to tune a backbone: one file each, one registry."""

from . import (  # noqa: F401 - importing registers them
    adaptformer,
    childtune,
    fisher_terms,
    fishertune,
    freeze,
    full,
    peft_tuners,
    random_choice,
    rein,
    set,
    vpt,
    vqt,
)
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
