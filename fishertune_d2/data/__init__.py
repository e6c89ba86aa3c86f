"""Data: labels, data sets, the mapper and the loaders."""

from .check import check_datasets
from .datasets import load_datasets, register_sem_seg
from .files import DatasetError
from .loader import build_test_loader, build_train_loader
from .mapper import SegmentationMapper

__all__ = [
    "DatasetError",
    "SegmentationMapper",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "load_datasets",
    "register_sem_seg",
]
