"""The check before training: all files exist, can be read, and hold labels of their map."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.utils import comm

from fishertune_d2.data.check.label_problems import judge
from fishertune_d2.data.check.pixel_counts import count_pixels
from fishertune_d2.data.dataset_description import DatasetMetadata, SemSegDataset
from fishertune_d2.data.dataset_dicts import load_datasets
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.metadata import dataset_metadata, require_same_classes

_log = logging.getLogger(__name__)


def check_datasets(names: Sequence[str], num_classes: int | None = None) -> None:
    """Loads the data sets and reads each of their files once, before a run spends time on them.

    Warns, once for each data set, of classes that no label holds. The pixel counts are kept in the
    cache folder (FISHERTUNE_CACHE), so that the next start with unchanged files (path, size, times)
    only lists the folders. In a run of several processes the first one checks, and the others wait.

    Args:
        names: Registered data sets, training sets first; a name may occur twice.
        num_classes: Classes of the model; None skips this comparison.

    Raises:
        DatasetError: one error for everything found: names that are not registered, missing
            folders and files, unreadable files, labels out of range, labels without a labelled
            pixel or with ids of another kind, data sets whose classes are not the model's or not
            the first data set's.
    """
    if comm.is_main_process():
        problems, first = [], None
        for name in dict.fromkeys(names):
            try:
                known = dataset_metadata(name)
                _check_number(known, num_classes)
                first = first or known
                require_same_classes(first, known)
                problems += _check(known)
            except DatasetError as error:
                problems.append(str(error))
        if problems:
            raise DatasetError("\n\n".join(problems))
    comm.synchronize()


def _check_number(known: DatasetMetadata, num_classes: int | None) -> None:
    count = len(known.classes)
    if num_classes is not None and count != num_classes:
        raise DatasetError(
            f"{known.name} has {count} classes, but the model has {num_classes}. Set "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES to {count}, or name another data set."
        )


def _check(known: DatasetMetadata) -> list[str]:
    """Returns the problems of a data set's labels; logs warnings if there are none."""
    dicts = load_datasets([known.name])
    problems, warnings = judge(known, dicts, count_pixels(known, dicts))
    if not problems and not isinstance(known, SemSegDataset):
        warnings += _different_names(known.name, dicts)
    for warning in warnings:
        _log.warning(warning)
    return problems


def _different_names(name: str, dicts: Sequence[dict[str, Any]]) -> list[str]:
    """Warns of pairs whose file names differ by more than an ending that all of them have."""
    images, labels = (
        _distinct_parts([item[key] for item in dicts]) for key in ("file_name", "sem_seg_file_name")
    )
    different = [k for k, image in enumerate(images) if image != labels[k]]
    if not different:
        return []
    first = dicts[different[0]]
    return [
        f"{name}: in {len(different)} of {len(dicts)} pairs image and label have different names, "
        f"first {first['file_name']} and {first['sem_seg_file_name']}. Does each label belong to "
        "its image? Detectron2's load_sem_seg pairs files by their place in the sorted folders, so "
        "a missing file shifts all files that follow."
    ]


def _distinct_parts(paths: Sequence[str]) -> list[str]:
    """Returns the files' names without the beginning and the ending that all of them share."""
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    for _ in range(2):  # forwards, and reversed
        shared = len(os.path.commonprefix(names))
        names = [name[shared:][::-1] for name in names]
    return names
