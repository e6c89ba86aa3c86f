"""The check before training: every file is there, can be read, and holds labels of its map."""

import logging
from collections.abc import Sequence

from detectron2.utils import comm

from fishertune_d2.data.check.judging import judge
from fishertune_d2.data.check.reading import count_pixels
from fishertune_d2.data.datasets import load_datasets
from fishertune_d2.data.files import DatasetError
from fishertune_d2.data.metadata import DatasetMetadata, dataset_metadata, require_same_classes

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
    for warning in warnings if not problems else ():
        _log.warning(warning)
    return problems
