"""FisherTune for Detectron2.

Importing this package registers its models and data sets with Detectron2; it needs no data, no
network and no compiler.
"""

from . import compat

compat.require_detectron2()

from . import data, engine, evaluation, modeling, tuning  # noqa: E402 - after the check above
from .config import add_fishertune_config  # noqa: E402

__all__ = ["add_fishertune_config", "data", "engine", "evaluation", "modeling", "tuning"]
