"""A data set's row, and how it becomes pairs of an image and a label on disk."""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from fishertune_d2.data.files import DatasetError, image_size
from fishertune_d2.data.labels import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_COLORS,
    LABEL_SPACES,
    Color,
    LabelSpace,
)

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Label files that other tools write beside the ones the authors ship.
_CONVERTED = "_labelTrainIds.png"
# Files named in one error; more would bury the remedy.
_MAX_NAMED = 5


def datasets_root() -> Path:
    """The folder that holds the data sets, read from the environment at every call."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


def cache_root() -> Path:
    """The folder for what FisherTune itself writes and can write again."""
    return Path(os.environ.get("FISHERTUNE_CACHE", "~/.cache/fishertune_d2")).expanduser()


@dataclass(frozen=True)
class SemSegDataset:
    """One row: where a data set lies, and what its labels mean.

    An image ``image_dir/x/y<image suffix>`` belongs to the label ``label_dir/x/y<label_suffix>``,
    at any depth of folders.

    Attributes:
        name: the name in Detectron2's catalogs.
        image_dir: folder of the images, relative to the root.
        label_dir: folder of the labels, relative to the root.
        label_map: a name in `LABEL_MAPS`.
        domain: where and when it was taken. A test set whose domain is trained on is a source,
            any other is unseen.
        image_suffixes: how image names end; several where copies of a data set differ.
        label_suffix: how label names end.
        label_space: the classes it is scored in.
        test_size: (width, height) in pixels into which test images are fitted, keeping their
            ratio; None tests at the file's size.
        keep: picks files by their path below ``image_dir`` without the suffix, as "x/y".
        drop_mismatched: drop and count pairs of unequal size instead of refusing them.
        root: finds the root folder when the data set is loaded.
        classes: the classes its label map leads to, which the model is trained on.
        colors: their RGB colours.
    """

    name: str
    image_dir: str
    label_dir: str
    label_map: str
    domain: str
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    label_suffix: str = ".png"
    label_space: LabelSpace = LABEL_SPACES["cityscapes19"]
    test_size: tuple[int, int] | None = None
    keep: Callable[[str], bool] | None = None
    drop_mismatched: bool = False
    root: Callable[[], Path] = datasets_root
    classes: tuple[str, ...] = CITYSCAPES_CLASSES
    colors: tuple[Color, ...] = CITYSCAPES_COLORS

    def tree(self, root: Path) -> str:
        """Describes the folders that this row expects below ``root``."""
        images = " or ".join(f"*{suffix}" for suffix in self.image_suffixes)
        return (
            f"  {root / self.image_dir}/**/{images}    (images)\n"
            f"  {root / self.label_dir}/**/*{self.label_suffix}    "
            f"(labels with {self.label_map!r} ids)"
        )


def load_pairs(row: SemSegDataset) -> list[dict]:
    """Finds the pairs of a row on disk and reads their sizes.

    Returns:
        One dict per pair, sorted by path: file_name, sem_seg_file_name, height, width (pixels of
        image and label), image_id (the path below ``image_dir``, without suffix), label_map,
        test_size.

    Raises:
        DatasetError: if a folder, an image or a label is missing, a header cannot be read, or an
            image and its label differ in size.
    """
    root = row.root()
    image_dir, label_dir = root / row.image_dir, root / row.label_dir
    for folder in (image_dir, label_dir):
        if not folder.is_dir():
            raise DatasetError(_missing_folder(row, root, folder))
    images = _find(image_dir, row.image_suffixes, row.keep)
    labels = _find(label_dir, (row.label_suffix,), row.keep)
    if not images:
        raise DatasetError(f"{row.name}: no image found. It needs\n{row.tree(root)}")
    _check_pairs(row, images, labels, image_dir, label_dir)

    stems = sorted(images)
    with ThreadPoolExecutor(max_workers=8) as pool:  # waiting for the disk, mostly
        image_sizes = list(pool.map(image_size, (images[stem] for stem in stems)))
        label_sizes = list(pool.map(image_size, (labels[stem] for stem in stems)))
    mismatched = [
        f"{images[stem]} has {a[1]}x{a[0]} pixels and {labels[stem]} {b[1]}x{b[0]}"
        for stem, a, b in zip(stems, image_sizes, label_sizes, strict=True)
        if a != b
    ]
    if mismatched and not row.drop_mismatched:
        raise DatasetError(
            f"{row.name}: {some(mismatched)}. An image and its label must have the same size; "
            "download or export the pair again."
        )
    if mismatched:
        _log.warning("%s: dropped %d pairs of unequal size", row.name, len(mismatched))
    return [
        {
            "file_name": str(images[stem]),
            "sem_seg_file_name": str(labels[stem]),
            "height": size[0],
            "width": size[1],
            "image_id": stem,
            "label_map": row.label_map,
            "test_size": row.test_size,
        }
        for stem, size, label_size in zip(stems, image_sizes, label_sizes, strict=True)
        if size == label_size
    ]


def _find(
    folder: Path, suffixes: Sequence[str], keep: Callable[[str], bool] | None
) -> dict[str, Path]:
    """Maps the path below ``folder`` without suffix to the file."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        suffix = next((s for s in suffixes if path.name.endswith(s)), None)
        if suffix is None or path.name.startswith("."):  # "._x.png" are macOS's notes on x.png
            continue
        if path.name.endswith(_CONVERTED) and not suffix.endswith(_CONVERTED):
            continue
        stem = path.relative_to(folder).as_posix().removesuffix(suffix)
        if keep is not None and not keep(stem):
            continue
        if stem in found:
            raise DatasetError(f"{found[stem]} and {path} are the same image twice; remove one.")
        found[stem] = path
    return found


def _check_pairs(
    row: SemSegDataset,
    images: dict[str, Path],
    labels: dict[str, Path],
    image_dir: Path,
    label_dir: Path,
) -> None:
    """Raises if an image has no label or a label no image."""
    no_label = [
        f"{label_dir / stem}{row.label_suffix}" for stem in sorted(images.keys() - labels.keys())
    ]
    if no_label:
        raise DatasetError(
            f"{row.name}: {len(no_label)} of {len(images)} images have no label. Missing: "
            f"{some(no_label)}. Restore the labels, or remove those images."
        )
    no_image = [
        f"{image_dir / stem}{row.image_suffixes[0]}"
        for stem in sorted(labels.keys() - images.keys())
    ]
    if no_image:
        raise DatasetError(
            f"{row.name}: {len(no_image)} of {len(labels)} labels have no image. Missing: "
            f"{some(no_image)} (or {', '.join(row.image_suffixes)}). Restore the images, or "
            "remove those labels."
        )


def _missing_folder(row: SemSegDataset, root: Path, folder: Path) -> str:
    remedy = (
        f"Put the data there, or set DETECTRON2_DATASETS (now {str(root)!r}) to the folder that "
        "holds them."
        if row.root is datasets_root
        else "Put the data there, or correct the path."
    )
    return f"{row.name}: no folder {folder}. It needs\n{row.tree(root)}\n{remedy}"


def some(items: Sequence[str]) -> str:
    """Joins the first items of a long list, and counts the others."""
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return "; ".join(items[:_MAX_NAMED]) + more
