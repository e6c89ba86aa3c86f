"""What a run has learnt, for others: a delta to the public weights, or plain files.

``python -m fishertune_d2.export`` writes both. Where Detectron2 is not installed, ``apply_delta``
still turns a timm model with public weights into the tuned one.
"""

from fishertune_d2.compat import has_detectron2

from .delta import Architecture, Delta, apply_delta

__all__ = ["Architecture", "Delta", "apply_delta"]

if has_detectron2():
    from .plain import LAYOUTS, TunedModel
    from .run import delta_of_run, read_tuned, tuned_backbone

    __all__ += ["LAYOUTS", "TunedModel", "delta_of_run", "read_tuned", "tuned_backbone"]
