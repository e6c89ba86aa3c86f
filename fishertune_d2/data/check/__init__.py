"""Whether data sets are whole: before a run, and by hand with ``python -m``."""

from .before import check_datasets
from .reading import class_counts

__all__ = ["check_datasets", "class_counts"]
