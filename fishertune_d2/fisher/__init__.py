"""Which weights of a vision foundation model to tune. Pure PyTorch, without Detectron2.

:func:`select` is the short way: from a model, batches and a loss to the selected weights. Its parts
are :func:`find_candidates`, :func:`estimate_fisher`, :func:`domain_related_fisher` and
:meth:`Selection.from_scores`.
"""

from .activations import keeping_activations
from .allocation import ALLOCATIONS, count_of_share
from .batch_losses import image_seeds, seeded
from .candidates import KINDS, Candidate, find_candidates
from .estimate import LABELS, estimate_fisher
from .estimators import (
    ESTIMATORS,
    BatchMean,
    ClosedForm,
    Diagonal,
    DiagonalLoop,
    Natural,
    Pathwise,
    Smoothed,
    Variational,
)
from .estimators.estimator import Cost, Estimator
from .estimators.free_energy import FreeEnergy
from .fisher_estimate import FisherEstimate
from .image_shift import ImageShift
from .likelihood import SoftmaxLikelihood, sampled_nll
from .perturb import Perturbation, StatisticsPerturbation
from .schedule import tuned_share
from .score import domain_related_fisher, relative_change
from .select import select
from .selection import Selection, Slices, entries_within, overlap
from .unit_steps import STEPS, steps_of_units
from .units import UNITS, Units, slices_of

__all__ = [
    "ALLOCATIONS",
    "ESTIMATORS",
    "KINDS",
    "LABELS",
    "STEPS",
    "UNITS",
    "BatchMean",
    "Candidate",
    "ClosedForm",
    "Cost",
    "Diagonal",
    "DiagonalLoop",
    "Estimator",
    "FisherEstimate",
    "FreeEnergy",
    "Natural",
    "Pathwise",
    "Selection",
    "Smoothed",
    "Slices",
    "SoftmaxLikelihood",
    "ImageShift",
    "Perturbation",
    "StatisticsPerturbation",
    "Units",
    "Variational",
    "count_of_share",
    "domain_related_fisher",
    "entries_within",
    "estimate_fisher",
    "find_candidates",
    "image_seeds",
    "keeping_activations",
    "overlap",
    "relative_change",
    "sampled_nll",
    "seeded",
    "select",
    "slices_of",
    "steps_of_units",
    "tuned_share",
]
