"""Which weights of a vision foundation model to tune. Pure PyTorch: knows nothing of Detectron2."""

from .candidates import KINDS, Candidate, find_candidates
from .estimate import ESTIMATORS, FisherEstimate, estimate_fisher
from .perturb import StatisticsPerturbation
from .schedule import tuned_share
from .score import domain_related_fisher, relative_change
from .selection import Selection, count_of_share, overlap

__all__ = [
    "ESTIMATORS",
    "KINDS",
    "Candidate",
    "FisherEstimate",
    "Selection",
    "StatisticsPerturbation",
    "count_of_share",
    "domain_related_fisher",
    "estimate_fisher",
    "find_candidates",
    "overlap",
    "relative_change",
    "tuned_share",
]
