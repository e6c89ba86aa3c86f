"""Training: the trainer, its stages as hooks, the optimizer."""

from .checkpoint import WholeCheckpointer
from .hooks import FisherEstimation, LearningRates, ParameterMask, WarmupFreeze
from .optimizer import build_optimizer
from .other_trainers import apply_fishertune
from .parameter_counts import count_parameters, log_plan
from .processes import launch
from .trainer import Trainer

__all__ = [
    "FisherEstimation",
    "LearningRates",
    "ParameterMask",
    "Trainer",
    "WarmupFreeze",
    "WholeCheckpointer",
    "apply_fishertune",
    "build_optimizer",
    "count_parameters",
    "launch",
    "log_plan",
]
