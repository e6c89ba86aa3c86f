"""Finds a data set's pairs of an image and a label on disk, and reads their sizes."""

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from detectron2.utils import comm
from detectron2.utils.logger import log_first_n

from fishertune_d2.data.dataset_description import SemSegDataset, datasets_root
from fishertune_d2.data.file_search import find_files, folders, other_files
from fishertune_d2.data.headers import Header
from fishertune_d2.data.image_files import DatasetError, image_header, size_remedy
from fishertune_d2.files import first_names

_log = logging.getLogger(__name__)
_CHUNK = 256  # headers for each task of a thread: one task for each file would cost more


@dataclass
class _Half:
    """All images or all labels of a data set."""

    kind: str  # "images" or "labels"
    folder: Path  # maybe with a "*"
    where: list[str]  # the folders on disk that fit
    suffixes: Sequence[str]
    files: dict[str, str] = field(default_factory=dict)  # by their path without the suffix


def load_pairs(dataset: SemSegDataset) -> list[dict[str, Any]]:
    """Finds the pairs of a data set on disk and reads their sizes.

    Returns:
        One dict per pair, sorted by path: file_name, sem_seg_file_name, height, width (pixels of
        image and label), image_id (the path below ``image_dir``, without suffix), dataset_name,
        label_map, test_size, halve_label; shift, if the data set has one.

    Raises:
        DatasetError: if a folder, an image or a label is missing, a header cannot be read, or an
            image and its label differ in size.
    """
    root = dataset.root()
    images, labels = _find_halves(dataset, root)
    if not images.files:
        others = other_files(images.where, images.suffixes)
        raise DatasetError(
            f"{dataset.name}: no image found.{others} It needs\n{dataset.tree(root)}"
        )
    _require_partners(dataset, images, labels, "images have no label")
    _require_partners(dataset, labels, images, "labels have no image")

    stems = sorted(images.files)
    headers = _read_headers([half.files[stem] for half in (images, labels) for stem in stems])
    image_headers, label_headers = headers[: len(stems)], headers[len(stems) :]
    unequal = {
        stem: (image, label)
        for stem, image, label in zip(stems, image_headers, label_headers, strict=True)
        if image.size != label.size
    }
    if unequal and not dataset.drop_mismatched:
        raise DatasetError(_unequal_sizes(dataset, images, labels, unequal))
    _mention_turned(dataset, image_headers)
    _mention_numbers(dataset, len(stems) - len(unequal), len(unequal))
    return [
        {
            "file_name": images.files[stem],
            "sem_seg_file_name": labels.files[stem],
            "height": header.height,
            "width": header.width,
            "image_id": stem,
            "dataset_name": dataset.name,
            "label_map": dataset.label_map,
            "test_size": dataset.test_size,
            "halve_label": dataset.halve_labels,
            **({"shift": dataset.shift} if dataset.shift else {}),
        }
        for stem, header in zip(stems, image_headers, strict=True)
        if stem not in unequal
    ]


def choose_dirs(dataset: SemSegDataset, root: Path) -> tuple[str, str] | None:
    """Returns the first pair of (image_dir, label_dir) of which both exist; None if none does."""
    for image_dir, label_dir in dataset.dirs():
        if folders(root, image_dir) and folders(root, label_dir):
            return image_dir, label_dir
    return None


def _find_halves(dataset: SemSegDataset, root: Path) -> tuple[_Half, _Half]:
    """Finds images and labels; files that the list of images does not name are left out."""
    dirs = choose_dirs(dataset, root)
    if dirs is None:
        raise DatasetError(_no_folder(dataset, root))
    images, labels = (
        _Half(kind, root / folder, folders(root, folder), suffixes)
        for kind, folder, suffixes in (
            ("images", dirs[0], dataset.image_suffixes),
            ("labels", dirs[1], dataset.label_suffixes),
        )
    )
    for half, other in ((images, labels), (labels, images)):
        # In a shared folder, a file that ends in a longer suffix belongs to the other half.
        excluded = other.suffixes if half.where == other.where else ()
        half.files = find_files(half.where, half.suffixes, dataset.keep, excluded)
    if dataset.image_list is not None:
        listed = _read_list(dataset, root / dataset.image_list, root, images.files)
        for half in (images, labels):
            half.files = {stem: path for stem, path in half.files.items() if stem in listed}
    return images, labels


def _no_folder(dataset: SemSegDataset, root: Path) -> str:
    """Says which folder is missing, and the remedy."""
    absent = dataset.label_dir if folders(root, dataset.image_dir) else dataset.image_dir
    remedy = (
        f"Put the data there, or set DETECTRON2_DATASETS (now {str(root)!r}) to the folder that "
        "holds them."
        if dataset.root is datasets_root
        else "Put the data there, or correct the path."
    )
    return f"{dataset.name}: no folder {root / absent}. It needs\n{dataset.tree(root)}\n{remedy}"


def _read_list(dataset: SemSegDataset, path: Path, root: Path, images: dict[str, str]) -> set[str]:
    """Reads the images to use from the authors' list, as keys of ``images``."""
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{dataset.name}: cannot read {path} ({type(error).__name__}: {error}), which names "
            f"the images to use. It needs\n{dataset.tree(root)}"
        ) from error
    prefix = f"{PurePosixPath(dataset.image_dir).name}/"
    stems = {}
    for line in lines:
        suffix = next((s for s in dataset.image_suffixes if line.lower().endswith(s.lower())), "")
        stems[line] = line[: len(line) - len(suffix)].removeprefix(prefix)
    absent = [line for line in lines if stems[line] not in images]
    if absent:
        raise DatasetError(
            f"{dataset.name}: {path} names {len(absent)} of {len(lines)} images that are not "
            f"there: {first_names(absent)}. Restore them, or the list as its authors ship it."
        )
    return set(stems.values())


def _require_partners(dataset: SemSegDataset, there: _Half, wanted: _Half, lack: str) -> None:
    """Raises if a file of one half has no partner in the other half."""
    missing = [
        f"{wanted.folder / stem}{wanted.suffixes[0]}"
        for stem in sorted(there.files.keys() - wanted.files.keys())
    ]
    if missing:
        endings = f" (or {', '.join(wanted.suffixes[1:])})" if len(wanted.suffixes) > 1 else ""
        raise DatasetError(
            f"{dataset.name}: {len(missing)} of {len(there.files)} {lack}. Missing: "
            f"{first_names(missing)}{endings}.{other_files(wanted.where, wanted.suffixes)} Restore "
            f"the {wanted.kind}, or remove those {there.kind}."
        )


def _unequal_sizes(
    dataset: SemSegDataset,
    images: _Half,
    labels: _Half,
    unequal: dict[str, tuple[Header, Header]],
) -> str:
    """Names the pairs of unequal size, and the remedy."""
    texts = [
        f"{images.files[stem]} has {image.width}x{image.height} pixels and {labels.files[stem]} "
        f"{label.width}x{label.height}"
        for stem, (image, label) in unequal.items()
    ]
    first = next(iter(unequal))
    remedy = size_remedy(images.files[first], labels.files[first])
    return f"{dataset.name}: {first_names(texts)}. {remedy}"


def _mention_turned(dataset: SemSegDataset, headers: Sequence[Header]) -> None:
    """Warns, once in a run, of images that are turned by a tag.

    Labels that were drawn on the stored pixels may have the same size, and still be wrong.
    """
    turned = sum(header.orientation > 1 for header in headers)
    if turned and comm.is_main_process():
        log_first_n(
            logging.WARNING,
            f"{dataset.name}: {turned} of {len(headers)} images have an orientation tag. They are "
            "turned upright, as viewers show them and Detectron2 reads them; their labels must be "
            "drawn on the upright images.",
            name=__name__,
            key="message",
        )


def _mention_numbers(dataset: SemSegDataset, found: int, dropped: int) -> None:
    """Warns of dropped pairs, and of another number of pairs than the published one."""
    if dropped:
        _log.warning("%s: dropped %d pairs of unequal size", dataset.name, dropped)
    if dataset.published and found != dataset.published.pairs:
        _log.warning(
            f"{dataset.name}: {found} pairs, {dataset.published.pairs} are published; scores will "
            "not compare with those of others"
        )


def _read_headers(paths: Sequence[str]) -> list[Header]:
    """Reads all headers; several at once, because reading mostly waits for the disk."""
    chunks = [paths[i : i + _CHUNK] for i in range(0, len(paths), _CHUNK)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        read = pool.map(lambda part: [image_header(path) for path in part], chunks)
        return [header for part in read for header in part]
