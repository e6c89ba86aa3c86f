"""A data set's row, and how it becomes pairs of an image and a label on disk."""

import logging
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from glob import escape, glob
from pathlib import Path, PurePosixPath

from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from PIL import Image

from fishertune_d2.data.files import DatasetError, image_header, size_remedy
from fishertune_d2.data.headers import Header
from fishertune_d2.data.labels import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_COLORS,
    LABEL_SPACES,
    Color,
    LabelSpace,
)
from fishertune_d2.files import first_names

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
# Label files that other tools write beside the ones the authors ship.
_CONVERTED = "_labelTrainIds.png"


def datasets_root() -> Path:
    """The folder that holds the data sets, read from the environment at every call."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


@dataclass(frozen=True)
class Published:
    """What is known of a data set as its authors publish it; the check compares with it.

    Attributes:
        pairs: their number, without those that ``drop_mismatched`` drops.
        sizes: (width, height) in pixels of its images; empty where they vary.
        absent: classes that its labels never hold; None where this is not known.
        shares: for some classes their percentage of all pixels, the ignored ones included.
    """

    pairs: int
    sizes: tuple[tuple[int, int], ...] = ()
    absent: tuple[str, ...] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class SemSegDataset:
    """One row: where a data set lies, and what its labels mean.

    An image ``image_dir/x/y<image suffix>`` belongs to the label ``label_dir/x/y<label suffix>``,
    at any depth of folders. A ``*`` in a folder's path stands for any one folder name; all folders
    that fit are read as one.

    Attributes:
        name: the name in Detectron2's catalogs.
        image_dir: folder of the images, relative to the root.
        label_dir: folder of the labels, relative to the root.
        label_map: a name in `LABEL_MAPS`.
        domain: where and when it was taken, as a path from the whole to its parts: "acdc/fog" is
            part of "acdc". A test set is a source if its domain, a part of it or a whole that it
            is part of is trained on, else unseen.
        other_dirs: pairs of (image_dir, label_dir) for the same files as other projects or other
            releases arrange them; the first pair of which both exist is read.
        image_suffixes: how image names end, in upper or lower case; several where copies of a data
            set differ. One may be given as a string, and a mere file type without its dot.
        label_suffixes: how label names end; several where kinds of labels are mixed.
        image_list: a text file, relative to the root, that names the images to use, one in a line,
            by their path below the folder that holds ``image_dir``. None uses all.
        label_space: the classes it is scored in.
        test_size: (width, height) in pixels into which test images are fitted, keeping their
            ratio; None tests at the file's size.
        halve_labels: whether it is scored on labels of half the width and height.
        keep: picks files by their path below the folder without the suffix, as "x/y".
        drop_mismatched: drop and count pairs of unequal size instead of refusing them.
        published: known numbers; None where there are none.
        root: finds the root folder when the data set is loaded.
        classes: the classes its label map leads to, which the model is trained on.
        colors: their RGB colours.
    """

    name: str
    image_dir: str
    label_dir: str
    label_map: str
    domain: str
    other_dirs: tuple[tuple[str, str], ...] = ()
    image_suffixes: tuple[str, ...] = IMAGE_SUFFIXES
    label_suffixes: tuple[str, ...] = (".png",)
    image_list: str | None = None
    label_space: LabelSpace = LABEL_SPACES["cityscapes19"]
    test_size: tuple[int, int] | None = None
    halve_labels: bool = False
    keep: Callable[[str], bool] | None = None
    drop_mismatched: bool = False
    published: Published | None = None
    root: Callable[[], Path] = datasets_root
    classes: tuple[str, ...] = CITYSCAPES_CLASSES
    colors: tuple[Color, ...] = CITYSCAPES_COLORS

    def __post_init__(self):
        """Brings the suffixes to one form.

        Raises:
            DatasetError: if one cannot be how a file's name ends.
        """
        for key in ("image_suffixes", "label_suffixes"):
            object.__setattr__(self, key, _suffixes(self.name, key, getattr(self, key)))

    def dirs(self) -> tuple[tuple[str, str], ...]:
        """Returns all pairs of (image_dir, label_dir), the authors' first."""
        return ((self.image_dir, self.label_dir), *self.other_dirs)

    def tree(self, root: Path) -> str:
        """Describes the folders that this row expects below ``root``."""
        images = " or ".join(f"*{suffix}" for suffix in self.image_suffixes)
        labels = " or ".join(f"*{suffix}" for suffix in self.label_suffixes)
        lines = []
        for image_dir, label_dir in self.dirs():
            lines += ["or"] if lines else []
            lines.append(f"  {root / image_dir}/**/{images}    (images)")
            lines.append(
                f"  {root / label_dir}/**/{labels}    (labels with {self.label_map!r} ids)"
            )
        if self.image_list:
            lines.append(f"  {root / self.image_list}    (the images to use)")
        return "\n".join(lines)


def load_pairs(row: SemSegDataset) -> list[dict]:
    """Finds the pairs of a row on disk and reads their sizes.

    Returns:
        One dict per pair, sorted by path: file_name, sem_seg_file_name, height, width (pixels of
        image and label), image_id (the path below ``image_dir``, without suffix), dataset_name,
        label_map, test_size, halve_label.

    Raises:
        DatasetError: if a folder, an image or a label is missing, a header cannot be read, or an
            image and its label differ in size.
    """
    root = row.root()
    image_dir, label_dir = choose_dirs(row, root)
    shared = folders(root, image_dir) == folders(root, label_dir)
    suffixes = row.image_suffixes, row.label_suffixes
    images, labels = (
        _find(folders(root, where), own, row.keep, others if shared else ())
        for where, own, others in zip((image_dir, label_dir), suffixes, suffixes[::-1], strict=True)
    )
    if row.image_list is not None:
        listed = _read_list(row, root, images)
        images = {stem: path for stem, path in images.items() if stem in listed}
        labels = {stem: path for stem, path in labels.items() if stem in listed}
    if not images:
        others = _others(folders(root, image_dir), row.image_suffixes)
        raise DatasetError(f"{row.name}: no image found.{others} It needs\n{row.tree(root)}")
    _check_pairs(row, images, labels, root, image_dir, label_dir)

    stems = sorted(images)
    headers = _headers([*(images[s] for s in stems), *(labels[s] for s in stems)])
    image_headers, label_headers = headers[: len(stems)], headers[len(stems) :]
    sizes, label_sizes = ([h[:2] for h in each] for each in (image_headers, label_headers))
    mismatched = [
        f"{images[stem]} has {a[1]}x{a[0]} pixels and {labels[stem]} {b[1]}x{b[0]}"
        for stem, a, b in zip(stems, sizes, label_sizes, strict=True)
        if a != b
    ]
    if mismatched and not row.drop_mismatched:
        stem = next(s for s, a, b in zip(stems, sizes, label_sizes, strict=True) if a != b)
        remedy = size_remedy(images[stem], labels[stem])
        raise DatasetError(f"{row.name}: {first_names(mismatched)}. {remedy}")
    _mention_turned(row, image_headers)
    if mismatched:
        _log.warning("%s: dropped %d pairs of unequal size", row.name, len(mismatched))
    found = len(stems) - len(mismatched)
    if row.published and found != row.published.pairs:
        _log.warning(
            "%s: %d pairs, %d are published; scores will not compare with those of others",
            row.name,
            found,
            row.published.pairs,
        )
    return [
        {
            "file_name": images[stem],
            "sem_seg_file_name": labels[stem],
            "height": size[0],
            "width": size[1],
            "image_id": stem,
            "dataset_name": row.name,
            "label_map": row.label_map,
            "test_size": row.test_size,
            "halve_label": row.halve_labels,
        }
        for stem, size, label_size in zip(stems, sizes, label_sizes, strict=True)
        if size == label_size
    ]


def _mention_turned(row: SemSegDataset, headers: Sequence[Header]) -> None:
    """Warns, once in a run, of images that are turned by a tag.

    Labels that were drawn on the stored pixels may have the same size, and fit nothing.
    """
    turned = sum(header.orientation > 1 for header in headers)
    if turned and comm.is_main_process():
        log_first_n(
            logging.WARNING,
            f"{row.name}: {turned} of {len(headers)} images have an orientation tag. They are "
            "turned upright, as viewers show them and Detectron2 reads them; their labels must be "
            "drawn on the upright images.",
            name=__name__,
            key="message",
        )


def folders(root: Path, pattern: str) -> list[str]:
    """Returns the existing folders that ``pattern`` names below ``root``."""
    path = str(root / pattern)
    if "*" in pattern:
        candidates = sorted(glob(os.path.join(escape(str(root)), pattern)))
    else:  # as it is: a person's own path may hold brackets
        candidates = [path]
    return [folder for folder in candidates if os.path.isdir(folder)]


def choose_dirs(row: SemSegDataset, root: Path) -> tuple[str, str]:
    """Returns the first pair of (image_dir, label_dir) of which both exist.

    Raises:
        DatasetError: if there is none; it names the folder that is missing, and the remedy.
    """
    for image_dir, label_dir in row.dirs():
        if folders(root, image_dir) and folders(root, label_dir):
            return image_dir, label_dir
    absent = row.label_dir if folders(root, row.image_dir) else row.image_dir
    remedy = (
        f"Put the data there, or set DETECTRON2_DATASETS (now {str(root)!r}) to the folder that "
        "holds them."
        if row.root is datasets_root
        else "Put the data there, or correct the path."
    )
    raise DatasetError(
        f"{row.name}: no folder {root / absent}. It needs\n{row.tree(root)}\n{remedy}"
    )


def _find(
    where: Sequence[str],
    suffixes: Sequence[str],
    keep: Callable[[str], bool] | None,
    others: Sequence[str],
) -> dict[str, str]:
    """Maps the path below its folder, without suffix, to the file.

    A file that ends in a longer one of ``others`` is of the other half of the pairs.
    """
    found: dict[str, str] = {}
    for folder in where:
        for stem, path in _walk(folder, suffixes):
            beyond = len(path) - len(os.path.join(folder, stem))
            if any(len(s) > beyond and path.lower().endswith(s.lower()) for s in others):
                continue
            if keep is not None and not keep(stem):
                continue
            if stem in found:
                raise DatasetError(
                    f"{found[stem]} and {path} are the same image twice; remove one."
                )
            found[stem] = path
    return found


def _walk(folder: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the path below ``folder`` without suffix, and the path, of the files that fit."""
    endings = [suffix.lower() for suffix in suffixes]
    for parent, names in _tree(folder):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        for name in names:
            suffix = next((s for s in endings if name.lower().endswith(s)), None)
            if suffix is None or name.startswith("."):  # "._x.png" are macOS's notes on x.png
                continue
            if name.endswith(_CONVERTED) and not suffix.endswith(_CONVERTED.lower()):
                continue
            yield prefix + name[: -len(suffix)], os.path.join(parent, name)


def _tree(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yields the folders below ``folder``, itself first, and the names of the files in each.

    Links to folders are followed, but not to one that holds the link: there it would go round and
    round.

    Raises:
        DatasetError: if a folder may not be read.
    """

    def refuse(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: cannot be read ({error}). Make it readable.")

    inside = {folder: (os.path.realpath(folder),)}  # the real folders on the way to each
    for parent, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        way = inside.pop(parent)
        below[:] = [name for name in below if not name.startswith(".")]  # .ipynb_checkpoints
        for name in list(below):
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if os.path.islink(path) and any(f"{step}/".startswith(f"{real}/") for step in way):
                below.remove(name)
            else:
                inside[path] = (*way, real)
        yield parent, sorted(names)


def _others(where: Sequence[str], suffixes: Sequence[str]) -> str:
    """Counts the files in folders that do not end as they should, with an example of each kind."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for folder in where:
        for _, names in _tree(folder):
            for name in names:
                if not name.lower().endswith(tuple(s.lower() for s in suffixes)):
                    ending = os.path.splitext(name)[1] or "without an ending"
                    counts[ending] += 1
                    example.setdefault(ending, name)
    found = [f"{count} {ending} ({example[ending]})" for ending, count in counts.most_common()]
    return f" Files of other names are there: {first_names(found)}." if found else ""


def _suffixes(name: str, key: str, given: str | Sequence[str]) -> tuple[str, ...]:
    """Checks how files' names end, and gives file types their dot; "*.png" is ".png"."""
    suffixes = []
    for suffix in given if isinstance(given, Iterable) and not isinstance(given, str) else (given,):
        if isinstance(suffix, str):
            suffix = suffix.removeprefix("*")
        bare = isinstance(suffix, str) and "." not in suffix  # else not asked: imports all plugins
        if bare and f".{suffix}".lower() in Image.registered_extensions():
            suffix = f".{suffix}"
        if not isinstance(suffix, str) or not re.fullmatch(r"[^*?/]*\.\w+", suffix):
            raise DatasetError(
                f"{name}: {key} holds {suffix!r}, which is not how the names of files end: give "
                "whole endings, such as ['_rgb.png'] or ['.jpg', '.png']."
            )
        suffixes.append(suffix)
    if not suffixes:
        raise DatasetError(f"{name}: {key} is empty: give the endings of the files, as ['.png'].")
    return tuple(suffixes)


def _read_list(row: SemSegDataset, root: Path, images: Mapping[str, str]) -> set[str]:
    """Reads the images to use from the authors' list, as keys of ``images``."""
    path = root / row.image_list
    try:
        lines = [line.strip() for line in path.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DatasetError(
            f"{row.name}: cannot read {path} ({type(error).__name__}: {error}), which names the "
            f"images to use. It needs\n{row.tree(root)}"
        ) from error
    prefix = f"{PurePosixPath(row.image_dir).name}/"
    listed: set[str] = set()
    absent: list[str] = []
    for line in lines:
        suffix = next((s for s in row.image_suffixes if line.lower().endswith(s.lower())), "")
        stem = line[: len(line) - len(suffix)].removeprefix(prefix)
        listed.add(stem)
        if stem not in images:
            absent.append(line)
    if absent:
        raise DatasetError(
            f"{row.name}: {path} names {len(absent)} of {len(lines)} images that are not there: "
            f"{first_names(absent)}. Restore them, or the list as its authors ship it."
        )
    return listed


def _check_pairs(
    row: SemSegDataset,
    images: Mapping[str, str],
    labels: Mapping[str, str],
    root: Path,
    image_dir: str,
    label_dir: str,
) -> None:
    """Raises if an image has no label or a label no image."""
    no_label = [
        f"{root / label_dir / stem}{row.label_suffixes[0]}"
        for stem in sorted(images.keys() - labels.keys())
    ]
    if no_label:
        raise DatasetError(
            f"{row.name}: {len(no_label)} of {len(images)} images have no label. Missing: "
            f"{first_names(no_label)}{_or_others(row.label_suffixes)}."
            f"{_others(folders(root, label_dir), row.label_suffixes)} Restore the labels, or "
            "remove those images."
        )
    no_image = [
        f"{root / image_dir / stem}{row.image_suffixes[0]}"
        for stem in sorted(labels.keys() - images.keys())
    ]
    if no_image:
        raise DatasetError(
            f"{row.name}: {len(no_image)} of {len(labels)} labels have no image. Missing: "
            f"{first_names(no_image)}{_or_others(row.image_suffixes)}."
            f"{_others(folders(root, image_dir), row.image_suffixes)} Restore the images, or "
            "remove those labels."
        )


def _or_others(suffixes: Sequence[str]) -> str:
    return f" (or {', '.join(suffixes[1:])})" if len(suffixes) > 1 else ""


def _headers(paths: Sequence[str]) -> list[Header]:
    """Reads all headers; several at once, as it is mostly waiting for the disk."""
    chunk = 256  # one task for each file would cost more than the reading
    chunks = [paths[i : i + chunk] for i in range(0, len(paths), chunk)]
    with ThreadPoolExecutor(max_workers=8) as pool:
        read = pool.map(lambda part: [image_header(path) for path in part], chunks)
        return [header for part in read for header in part]
