"""The check before training: every file is there, can be read, and holds labels of its map."""

import hashlib
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm
from tqdm import tqdm

from fishertune_d2.data.files import DatasetError, read_image, read_label
from fishertune_d2.data.pairs import cache_root, some

_log = logging.getLogger(__name__)
_T = TypeVar("_T")


def check_datasets(names: Sequence[str], num_classes: int | None = None) -> None:
    """Loads the data sets and reads each of their files once, before a run spends time on them.

    What passed is noted in the cache folder (FISHERTUNE_CACHE), so that the next start with
    unchanged files (path, size, time) only looks at the folders. In a run of several processes the
    first one checks, and the others wait.

    Args:
        names: registered data sets; a name may occur twice.
        num_classes: classes of the model; None skips this comparison.

    Raises:
        DatasetError: one error for everything found: missing folders and files, unreadable files,
            labels out of range, data sets whose classes are not the model's.
    """
    if comm.is_main_process():
        problems = []
        for name in dict.fromkeys(names):
            try:
                _check_classes(name, num_classes)
                _check_files(name, DatasetCatalog.get(name))
            except DatasetError as error:
                problems.append(str(error))
        if problems:
            raise DatasetError("\n\n".join(problems))
    comm.synchronize()


def _check_classes(name: str, num_classes: int | None) -> None:
    classes = MetadataCatalog.get(name).get("stuff_classes")
    if num_classes is not None and classes is not None and len(classes) != num_classes:
        raise DatasetError(
            f"{name} has {len(classes)} classes, but the model has {num_classes}. Set "
            f"MODEL.SEM_SEG_HEAD.NUM_CLASSES to {len(classes)}, or name another data set."
        )


def _check_files(name: str, dicts: list[dict[str, Any]]) -> None:
    """Decodes all files of a data set, unless they passed before."""
    digest, stamp = state_of_files(dicts), _stamp(name)
    if stamp.is_file() and stamp.read_text() == digest:
        return
    problems = [text for text in for_each_pair(name, dicts, _problem) if text is not None]
    if problems:
        raise DatasetError(bad_files(name, problems))
    note_passed(name, digest)


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
    return f"{name}: {len(problems)} bad files. {some(problems)}"


def note_passed(name: str, digest: str) -> None:
    """Notes that all files in the state ``digest`` can be read and hold ids of their map."""
    stamp = _stamp(name)
    try:
        stamp.parent.mkdir(parents=True, exist_ok=True)
        stamp.write_text(digest)
    except OSError as error:  # only the time of the next check is lost
        _log.info("Cannot note that %s was checked: %s", name, error)


def _stamp(name: str) -> Path:
    return cache_root() / "checked" / name


def _problem(item: dict[str, Any]) -> str | None:
    """Returns what is wrong with a pair of files, or None."""
    try:
        read_image(item["file_name"])
        read_label(item["sem_seg_file_name"], item["label_map"])
    except DatasetError as error:
        return str(error)
    return None


def state_of_files(dicts: Sequence[dict[str, Any]]) -> str:
    """Identifies the state of all files without reading them."""
    digest = hashlib.sha256()
    for item in dicts:
        for path in (item["file_name"], item["sem_seg_file_name"]):
            status = os.stat(path)
            digest.update(f"{path}|{status.st_size}|{status.st_mtime_ns}|".encode())
        digest.update(item["label_map"].encode())
    return digest.hexdigest()
