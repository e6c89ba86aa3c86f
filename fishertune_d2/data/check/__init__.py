"""Whether data sets are whole: before a run, and by hand with ``python -m``."""

from .reading import check_datasets

__all__ = ["check_datasets"]
