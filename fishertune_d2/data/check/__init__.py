"""Checks data sets: before a training, and with ``python -m fishertune_d2.data.check``."""

from .before_training import check_datasets
from .pixel_counts import class_counts

__all__ = ["check_datasets", "class_counts"]
