"""Writes trained models for others: a delta to the public weights, or plain files.

``python -m fishertune_d2.export`` writes both. ``apply_delta`` also works without Detectron2: it
turns a timm model with public weights into the tuned one.
"""

from fishertune_d2.compat import has_detectron2

from .delta import Architecture, Delta, apply_delta

__all__ = ["Architecture", "Delta", "apply_delta"]

if has_detectron2():
    from .layouts import LAYOUTS, TunedModel
    from .tuned_models import delta_of_run, read_tuned, tuned_backbone

    __all__ += ["LAYOUTS", "TunedModel", "delta_of_run", "read_tuned", "tuned_backbone"]
