"""What a run has learnt, for others: a delta to the public weights.

It can be applied where Detectron2 is not installed.
"""

from .delta import Architecture, Delta, apply_delta

__all__ = ["Architecture", "Delta", "apply_delta"]
