"""Training: the trainer, its stages as hooks, the optimizer."""

from .apply import apply_fishertune
from .checkpoint import WholeCheckpointer
from .hooks import FisherEstimation, LearningRates, ParameterMask, WarmupFreeze
from .launch import launch
from .optimizer import build_optimizer
from .plan import count_parameters, log_plan
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
