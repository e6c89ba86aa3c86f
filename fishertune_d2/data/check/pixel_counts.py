"""Reads each pair of files once, and keeps how many pixels of each class each label holds.

Shapes: N labels, C classes of the data set. Counts are (N, C + 1) int64, ignored pixels last.
"""

import hashlib
import logging
import os
import zipfile
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from detectron2.utils import comm
from tqdm import tqdm

from fishertune_d2.data.dataset_description import DatasetMetadata
from fishertune_d2.data.dataset_dicts import load_datasets
from fishertune_d2.data.image_files import DatasetError, read_image, read_label, size_remedy
from fishertune_d2.data.labels import IGNORE_LABEL
from fishertune_d2.data.metadata import dataset_metadata
from fishertune_d2.files import cache_root, first_names, whole_file

_log = logging.getLogger(__name__)
# Part of the digest of the files' state. Raise it when files are read in another way, so that
# files that passed before are read again.
_READING = "3"
# numpy raises these on files of another kind, and on files that a full disk or a kill cut off.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error)


def class_counts(names: Sequence[str]) -> np.ndarray:
    """Counts the pixels of each class in each label of registered data sets of the same classes.

    Files that the check before training has read are not read again. In a run of several processes
    the first one reads, and all of them get the counts.

    Returns:
        (N, C + 1) int64 for the N entries of ``load_datasets(names)`` and C classes; the last
        column counts the ignored pixels.
    """
    counts = None
    if comm.is_main_process():
        counts = np.concatenate(
            [count_pixels(dataset_metadata(name), load_datasets([name])) for name in names]
        )
    return comm.all_gather(counts)[0]


def count_pixels(known: DatasetMetadata, dicts: Sequence[dict[str, Any]]) -> np.ndarray:
    """Returns the kept (N, C + 1) counts of a data set's N entries, or reads its files.

    Raises:
        DatasetError: if files cannot be read or hold ids that their map does not know.
    """
    counts = _kept(known.name, state_of_files(dicts))
    if counts is not None and counts.shape == (len(dicts), len(known.classes) + 1):
        return counts
    counts, problem = read_pairs(known, dicts)
    if problem:
        raise DatasetError(problem)
    return counts


def read_pairs(
    known: DatasetMetadata, dicts: Sequence[dict[str, Any]]
) -> tuple[np.ndarray, str | None]:
    """Reads all files of a data set's entries in threads, and keeps the counts if all can be read.

    Returns:
        (M, C + 1) counts of the M pairs that can be read, and a text about the others.
    """
    state, width = state_of_files(dicts), len(known.classes) + 1
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        results = pool.map(partial(_read_pair, num_classes=width - 1), dicts)  # without the GIL
        title = f"Checking {known.name}"  # the bar shows only on a terminal
        read = list(tqdm(results, title, len(dicts), leave=False, disable=None, unit="pair"))
    bad = [result for result in read if isinstance(result, str)]
    good = [result for result in read if not isinstance(result, str)]
    counts = np.array(good, dtype=np.int64).reshape(-1, width)
    if bad:
        return counts, f"{known.name}: {len(bad)} bad files. {first_names(bad, separator='; ')}"
    keep(known.name, state, counts)
    return counts, None


def _read_pair(item: dict[str, Any], num_classes: int) -> np.ndarray | str:
    """Decodes a pair; returns the label's (C + 1,) pixels by class, or what is wrong."""
    pair = item["file_name"], item["sem_seg_file_name"]
    try:
        image = read_image(pair[0])
        label = read_label(pair[1], item["label_map"])
    except DatasetError as error:
        return str(error)
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


def keep(name: str, state: str, counts: np.ndarray) -> None:
    """Keeps a data set's counts, together with the state of its files before they were read."""
    path = _path(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as growing, growing.open("wb") as file:
            np.savez_compressed(file, state=state, counts=counts)
    except OSError as error:  # only the time of the next check is lost
        _log.info("The pixel counts of %s cannot be kept: %s", name, error)


def _kept(name: str, state: str) -> np.ndarray | None:
    try:
        with np.load(_path(name)) as kept:
            return kept["counts"] if str(kept["state"]) == state else None
    except _DAMAGED:  # or there is no such file: the data set is read again
        return None


def _path(name: str) -> Path:
    return cache_root() / "checked" / f"{name}.npz"


def state_of_files(dicts: Sequence[dict[str, Any]]) -> str:
    """Returns a digest, in hexadecimal, of the state of all files without reading them.

    The time of the last change (ctime) shows that a file was rewritten even if it has its old size
    and got its old modification time back.

    Raises:
        DatasetError: if a file does not exist, or is both an image and its label.
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
