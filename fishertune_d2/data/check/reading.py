"""Reads each pair of files once, and keeps how many pixels of each class each label holds."""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from detectron2.utils import comm
from tqdm import tqdm

from fishertune_d2.data.datasets import load_datasets
from fishertune_d2.data.files import DatasetError, read_image, read_label, size_remedy
from fishertune_d2.data.labels import IGNORE_LABEL
from fishertune_d2.data.metadata import dataset_metadata
from fishertune_d2.files import cache_root, first_names

_log = logging.getLogger(__name__)
_T = TypeVar("_T")
# Part of what a state of files is known by. A new number where files are read in another way, so
# that what passed before is read again.
_READING = "3"
# What numpy raises on files of another kind, and on those that a full disk or a kill left behind.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def class_counts(names: Sequence[str]) -> np.ndarray:
    """Counts the pixels of each class in each label of registered data sets.

    Files that the check before training has read are not read again. In a run of several processes
    the first one reads, and all of them get the counts.

    Args:
        names: registered data sets of the same classes.

    Returns:
        (N, C + 1) int64 for the N entries of ``load_datasets(names)`` and C classes; the last
        column counts the ignored pixels.

    Raises:
        DatasetError: if files are missing, cannot be read, or hold ids that their map does not
            know.
    """
    counts = None
    if comm.is_main_process():
        counts = np.concatenate([count_pixels(name, load_datasets([name])) for name in names])
    return comm.all_gather(counts)[0]


def count_pixels(name: str, dicts: Sequence[dict[str, Any]]) -> np.ndarray:
    """Counts as `class_counts` for one data set, in this process, unless its counts are kept.

    Args:
        name: of the data set.
        dicts: its entries.

    Returns:
        (N, C + 1) int64.

    Raises:
        DatasetError: if files cannot be read or hold ids that their map does not know.
    """
    state, num_classes = state_of_files(dicts), len(dataset_metadata(name).classes)
    counts = _kept(name, state)
    if counts is not None and counts.shape == (len(dicts), num_classes + 1):
        return counts
    read = list(for_each_pair(name, dicts, partial(read_pair, num_classes=num_classes)))
    problems = [found for found in read if isinstance(found, str)]
    if problems:
        raise DatasetError(bad_files(name, problems))
    counts = np.stack(read)
    keep(name, state, counts)
    return counts


def read_pair(item: dict[str, Any], num_classes: int) -> np.ndarray | str:
    """Decodes a pair of files.

    Args:
        item: an entry as `load_datasets` returns it.
        num_classes: C.

    Returns:
        (C + 1,) int64 pixels of the label by class, the ignored ones last; or what is wrong.
    """
    try:
        image = read_image(item["file_name"])
        label = read_label(item["sem_seg_file_name"], item["label_map"])
    except DatasetError as error:
        return str(error)
    pair = item["file_name"], item["sem_seg_file_name"]
    height, width = label.shape
    if image.shape[:2] != label.shape:
        size = f"{image.shape[1]}x{image.shape[0]}"
        return f"{pair[0]} has {size} pixels and {pair[1]} {width}x{height}. {size_remedy(*pair)}"
    if label.shape != (item["height"], item["width"]):
        return (
            f"{pair[1]} has {width}x{height} pixels, but its entry in the data set says "
            f"{item['width']}x{item['height']}. Correct the entry, or leave height and width out."
        )
    counts = np.bincount(label.ravel(), minlength=256)
    return np.append(counts[:num_classes], counts[IGNORE_LABEL])


def for_each_pair(
    name: str, dicts: Sequence[dict[str, Any]], look: Callable[[dict[str, Any]], _T]
) -> Iterable[_T]:
    """Applies ``look`` to all pairs in threads, with a progress bar on terminals."""
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(look, dicts)  # decoding releases the interpreter's lock
        yield from tqdm(
            results,
            f"Checking {name}",
            total=len(dicts),
            unit="pair",
            leave=False,
            disable=None,  # only on a terminal
        )


def bad_files(name: str, problems: Sequence[str]) -> str:
    """Formats what is wrong with files of a data set."""
    return f"{name}: {len(problems)} bad files. {first_names(problems, separator='; ')}"


def keep(name: str, state: str, counts: np.ndarray) -> None:
    """Keeps the counts of files that all can be read, for as long as the files stay as they are.

    Args:
        name: of the data set.
        state: what `state_of_files` returned before they were read.
        counts: (N, C + 1) int64.
    """
    path = _path(name)
    growing = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with growing.open("wb") as file:
            np.savez_compressed(file, state=state, counts=counts)
        growing.replace(path)
    except OSError as error:  # only the time of the next check is lost
        _log.info("Cannot keep what %s holds: %s", name, error)


def _kept(name: str, state: str) -> np.ndarray | None:
    try:
        with np.load(_path(name)) as kept:
            return kept["counts"] if str(kept["state"]) == state else None
    except _DAMAGED:  # or it is not there: the files are read again
        return None


def _path(name: str) -> Path:
    return cache_root() / "checked" / f"{name}.npz"


def state_of_files(dicts: Sequence[dict[str, Any]]) -> str:
    """Identifies the state of all files without reading them.

    The time of the last change (ctime) tells a file that was rewritten with its old size and got
    its old time back.

    Raises:
        DatasetError: if one is not there, or is both an image and its label.
    """
    digest = hashlib.sha256(_READING.encode())
    for item in dicts:
        files = []
        for path in (item["file_name"], item["sem_seg_file_name"]):
            try:
                status = os.stat(path)
            except OSError as error:
                raise DatasetError(f"{path}: {error.strerror}. Restore the file.") from error
            files.append((status.st_dev, status.st_ino))
            times = f"{status.st_mtime_ns}|{status.st_ctime_ns}"
            digest.update(f"{path}|{status.st_size}|{times}|".encode())
        if files[0] == files[1]:
            raise DatasetError(
                f"{item['dataset_name']}: {path} is both an image and its label. Name the folder "
                "and the ending of the label files, which hold the class of each pixel."
            )
        digest.update(item["label_map"].encode())
    return digest.hexdigest()
