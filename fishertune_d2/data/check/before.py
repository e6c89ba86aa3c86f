"""The check before training: every file is there, can be read, and holds labels of its map."""

import logging
import os
from collections.abc import Sequence
from typing import Any

from detectron2.utils import comm

from fishertune_d2.data.check.judging import judge
from fishertune_d2.data.check.reading import count_pixels
from fishertune_d2.data.datasets import load_datasets
from fishertune_d2.data.files import DatasetError
from fishertune_d2.data.metadata import (
    DatasetMetadata,
    dataset_metadata,
    registered_row,
    require_same_classes,
)

_log = logging.getLogger(__name__)


def check_datasets(names: Sequence[str], num_classes: int | None = None) -> None:
    """Loads the data sets and reads each of their files once, before a run spends time on them.

    Warns, once for each data set, of classes that no label holds. What the labels hold is kept in
    the cache folder (FISHERTUNE_CACHE), so that the next start with unchanged files (path, size,
    times) only looks at the folders. In a run of several processes the first one checks, and the
    others wait.

    Args:
        names: registered data sets, those of training first; a name may occur twice.
        num_classes: classes of the model; None skips this comparison.

    Raises:
        DatasetError: one error for everything found: names that are not registered, missing
            folders and files, unreadable files, labels out of range, labels without a labelled
            pixel or with ids of another kind, data sets whose classes are not the model's or not
            those of the first data set.
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
    """Returns what is wrong with the labels; warns of what may be right."""
    dicts = load_datasets([known.name])
    problems, warnings = judge(known, dicts, count_pixels(known.name, dicts))
    if registered_row(known.name) is None:
        warnings += _unlike_names(known.name, dicts)
    for warning in warnings if not problems else ():
        _log.warning(warning)
    return problems


def _unlike_names(name: str, dicts: Sequence[dict[str, Any]]) -> list[str]:
    """Warns of pairs whose files' names differ by more than an ending that all of them have."""
    images, labels = (
        _distinct_parts([item[key] for item in dicts]) for key in ("file_name", "sem_seg_file_name")
    )
    unlike = [k for k, image in enumerate(images) if image != labels[k]]
    if not unlike:
        return []
    first = dicts[unlike[0]]
    return [
        f"{name}: in {len(unlike)} of {len(dicts)} pairs image and label have different names, "
        f"first {first['file_name']} and {first['sem_seg_file_name']}. Does each label belong to "
        "its image? Detectron2's load_sem_seg pairs files by their place in the sorted folders, so "
        "that a missing file shifts all that follow."
    ]


def _distinct_parts(paths: Sequence[str]) -> list[str]:
    """Returns the files' names without the beginning and the ending that all of them share."""
    names = [os.path.splitext(os.path.basename(path))[0] for path in paths]
    for _ in range(2):  # forwards, and reversed
        shared = len(os.path.commonprefix(names))
        names = [name[shared:][::-1] for name in names]
    return names
