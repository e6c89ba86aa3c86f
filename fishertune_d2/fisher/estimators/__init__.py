"""The estimators of F, one file each, and their names in ``FISHER.ESTIMATOR``."""

from .batch_mean import BatchMean
from .closed_form import ClosedForm
from .diagonal import Diagonal, DiagonalLoop
from .estimator import Estimator
from .natural import Natural
from .pathwise import Pathwise
from .smoothed import Smoothed
from .variational import Variational

ESTIMATORS: dict[str, type[Estimator]] = {
    "diagonal": Diagonal,
    "diagonal_loop": DiagonalLoop,
    "smoothed": Smoothed,
    "closed_form": ClosedForm,
    "variational": Variational,
    "pathwise": Pathwise,
    "natural": Natural,
    "batch_mean": BatchMean,
}
