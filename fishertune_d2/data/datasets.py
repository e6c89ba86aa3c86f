"""The table of data sets, and how a row of it becomes pairs of files.

A new data set is one row in ``DATASETS``. Rows are registered in Detectron2's catalogs at import;
the disk is looked at when a data set is first loaded, below the folder that the environment
variable DETECTRON2_DATASETS names (default: ``datasets``).
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.colormap import colormap

from fishertune_d2.data.files import DatasetError, image_size
from fishertune_d2.data.labels import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_COLORS,
    IGNORE_LABEL,
    LABEL_SPACES,
    Color,
    LabelSpace,
    identity_space,
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


def _streets_root() -> Path:
    """Draws the built-in scenes if they are not there yet, and returns their folder."""
    from fishertune_d2.data.streets import ensure_streets  # costs only those who use it

    root = datasets_root() / "streets"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:  # data folders are often mounted read-only
        root = cache_root() / "streets"
        _log.info("DETECTRON2_DATASETS cannot hold the built-in data (%s)", error)
    _log.info("Built-in street scenes lie in %s", root)
    return ensure_streets(root)


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


def _is_dusk(stem: str) -> bool:
    return stem.startswith("0001TP")  # the one CamVid sequence that was filmed at dusk


def _is_day(stem: str) -> bool:
    return not _is_dusk(stem)


def _camvid(name: str, split: str, domain: str, keep: Callable[[str], bool]) -> SemSegDataset:
    return SemSegDataset(
        name=name,
        image_dir=f"CamVid/{split}",
        label_dir=f"CamVid/{split}annot",
        label_map="camvid",
        label_space=LABEL_SPACES["camvid11"],
        domain=domain,
        keep=keep,
    )


def _streets(split: str, domain: str) -> SemSegDataset:
    return SemSegDataset(
        name=f"streets_{domain}_{split}",
        image_dir=f"leftImg8bit/{split}/{domain}",
        label_dir=f"gtFine/{split}/{domain}",
        image_suffixes=("_leftImg8bit.png",),
        label_suffix="_gtFine_labelTrainIds.png",
        label_map="train_ids",
        domain=f"streets_{domain}",
        root=_streets_root,
    )


DATASETS: tuple[SemSegDataset, ...] = (
    _camvid("camvid_day_train", "train", "camvid_day", _is_day),
    _camvid("camvid_day_val", "val", "camvid_day", _is_day),
    _camvid("camvid_day_test", "test", "camvid_day", _is_day),
    _camvid("camvid_dusk_dev", "train", "camvid_dusk", _is_dusk),
    _camvid("camvid_dusk_test", "test", "camvid_dusk", _is_dusk),
    _streets("train", "day"),
    _streets("val", "day"),
    _streets("val", "dusk"),
    _streets("val", "night"),
    _streets("val", "fog"),
    _streets("val", "rain"),
    _streets("val", "snow"),
    SemSegDataset(
        name="gtav_train",
        image_dir="gta/images",
        label_dir="gta/labels",
        label_map="label_ids",
        domain="gtav",
        drop_mismatched=True,  # 62 of the 24,966 published pairs differ in size
    ),
    SemSegDataset(
        name="cityscapes_val",
        image_dir="cityscapes/leftImg8bit/val",
        label_dir="cityscapes/gtFine/val",
        image_suffixes=("_leftImg8bit.png",),
        label_suffix="_gtFine_labelIds.png",
        label_map="label_ids",
        domain="cityscapes",
        test_size=(1024, 512),
    ),
    SemSegDataset(
        name="bdd100k_val",
        image_dir="bdd100k/images/10k/val",
        label_dir="bdd100k/labels/sem_seg/masks/val",
        label_map="train_ids",
        domain="bdd100k",
        test_size=(1280, 720),
    ),
    SemSegDataset(
        name="mapillary_val",
        image_dir="mapillary/validation/images",
        label_dir="mapillary/validation/labels",
        label_map="mapillary_rein",
        domain="mapillary",
        test_size=(1024, 512),
    ),
)


def register(row: SemSegDataset) -> None:
    """Enters a row into Detectron2's catalogs, in place of an earlier row of that name.

    Raises:
        DatasetError: if the name is taken by a data set that is not FisherTune's.
    """
    if row.name in DatasetCatalog.list():
        if "label_space" not in MetadataCatalog.get(row.name).as_dict():
            raise DatasetError(
                f"The data set name {row.name!r} is taken by another package; choose another."
            )
        DatasetCatalog.remove(row.name)
        MetadataCatalog.remove(row.name)
    DatasetCatalog.register(row.name, lambda: load_pairs(row))
    MetadataCatalog.get(row.name).set(
        stuff_classes=list(row.classes),
        stuff_colors=[list(color) for color in row.colors],
        ignore_label=IGNORE_LABEL,
        evaluator_type="sem_seg",
        domain=row.domain,
        label_space=row.label_space,
        test_size=row.test_size,
    )


def register_sem_seg(
    name: str,
    image_dir: str | Path,
    label_dir: str | Path,
    classes: Sequence[str],
    *,
    image_suffixes: Sequence[str] = IMAGE_SUFFIXES,
    label_suffix: str = ".png",
    colors: Sequence[Color] | None = None,
    domain: str | None = None,
    test_size: tuple[int, int] | None = None,
) -> None:
    """Registers a folder of images and one of labels, so that configs can name it.

    Labels are images of one channel (grey or palette) that hold 0 to ``len(classes) - 1``, and
    255 where a pixel is to be ignored. MODEL.SEM_SEG_HEAD.NUM_CLASSES has to be ``len(classes)``.

    Args:
        name: the name to use in DATASETS.TRAIN or DATASETS.TEST.
        image_dir: folder of the images; folders inside it are searched too.
        label_dir: folder of the labels, with the same folders inside.
        classes: name of each class id.
        image_suffixes: how the images' names end.
        label_suffix: how the labels' names end: "a_rgb.png" and "a_mask.png" are a pair with
            ``image_suffixes=["_rgb.png"]`` and ``label_suffix="_mask.png"``.
        colors: RGB colour of each class for pictures.
        domain: test sets of the domain trained on count as source, others as unseen; by default
            the data set is a domain of its own.
        test_size: (width, height) into which test images are fitted; None keeps their size.

    Raises:
        DatasetError: if the number of classes or colours does not fit, or the name is taken.
    """
    if not 1 <= len(classes) <= IGNORE_LABEL:
        raise DatasetError(f"{name}: {len(classes)} classes given; labels hold 1 to 255 classes.")
    if colors is None:
        palette = colormap(rgb=True).astype(int).tolist()
        colors = [palette[k % len(palette)] for k in range(len(classes))]
    if len(colors) != len(classes):
        raise DatasetError(f"{name}: {len(colors)} colors given for {len(classes)} classes.")
    rgb = tuple((int(r), int(g), int(b)) for r, g, b in colors)
    register(
        SemSegDataset(
            name=name,
            image_dir=str(Path(image_dir).expanduser()),
            label_dir=str(Path(label_dir).expanduser()),
            label_map=f"identity_{len(classes)}",
            domain=domain or name,
            image_suffixes=tuple(image_suffixes),
            label_suffix=label_suffix,
            label_space=identity_space(classes, rgb),
            test_size=test_size,
            root=Path.cwd,
            classes=tuple(classes),
            colors=rgb,
        )
    )


def load_datasets(names: Sequence[str]) -> list[dict]:
    """Loads registered data sets one after the other into one list.

    Raises:
        DatasetError: if files are missing or do not fit, or if the data sets differ in classes.
    """
    if isinstance(names, str):
        raise TypeError(f"names is a list of data set names, got the string {names!r}")
    dicts: list[dict] = []
    for name in names:
        dicts += DatasetCatalog.get(name)
        first, this = (MetadataCatalog.get(n).stuff_classes for n in (names[0], name))
        if first != this:
            raise DatasetError(
                f"{names[0]} and {name} have different classes ({len(first)} and {len(this)}: "
                f"{first} and {this}); one model cannot be trained on both."
            )
    return dicts


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
            f"{row.name}: {_some(mismatched)}. An image and its label must have the same size; "
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
            f"{_some(no_label)}. Restore the labels, or remove those images."
        )
    no_image = [
        f"{image_dir / stem}{row.image_suffixes[0]}"
        for stem in sorted(labels.keys() - images.keys())
    ]
    if no_image:
        raise DatasetError(
            f"{row.name}: {len(no_image)} of {len(labels)} labels have no image. Missing: "
            f"{_some(no_image)} (or {', '.join(row.image_suffixes)}). Restore the images, or "
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


def _some(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return "; ".join(items[:_MAX_NAMED]) + more


for _row in DATASETS:
    register(_row)
