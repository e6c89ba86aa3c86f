"""Data: labels, data sets, the mapper and the loaders."""

from .check import check_datasets, class_counts
from .dataset_description import DatasetMetadata
from .dataset_dicts import load_datasets
from .image_files import DatasetError
from .labels import require_ignore_value
from .loader import build_test_loader, build_train_loader
from .mapper import SegmentationMapper
from .metadata import dataset_metadata
from .registration import register_sem_seg
from .unlabelled import find_unlabelled

__all__ = [
    "DatasetError",
    "DatasetMetadata",
    "SegmentationMapper",
    "build_test_loader",
    "build_train_loader",
    "check_datasets",
    "class_counts",
    "dataset_metadata",
    "find_unlabelled",
    "load_datasets",
    "register_sem_seg",
    "require_ignore_value",
]
