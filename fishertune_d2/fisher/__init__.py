"""Which weights of a vision foundation model to tune. Pure PyTorch: knows nothing of Detectron2."""

from .activations import keeping_activations
from .batch_losses import image_seeds, seeded
from .batch_mean import BatchMean
from .candidates import KINDS, Candidate, find_candidates
from .closed_form import ClosedForm
from .cost import Cost
from .diagonal import Diagonal, DiagonalLoop
from .estimate import ESTIMATORS, LABELS, Estimator, FisherEstimate, estimate_fisher
from .free_energy import FreeEnergy
from .likelihood import SoftmaxLikelihood, sampled_nll
from .natural import Natural
from .perturb import StatisticsPerturbation
from .schedule import tuned_share
from .score import domain_related_fisher, relative_change
from .selection import Selection, count_of_share, entries_within, overlap
from .smoothed import Smoothed
from .variational import Variational

__all__ = [
    "ESTIMATORS",
    "KINDS",
    "LABELS",
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
    "Selection",
    "Smoothed",
    "SoftmaxLikelihood",
    "StatisticsPerturbation",
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
    "tuned_share",
]
