"""How a data set is described: its classes, where its files are, and its published numbers."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.labels import (
    CITYSCAPES_CLASSES,
    CITYSCAPES_COLORS,
    LABEL_SPACES,
    Color,
    LabelSpace,
)

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")


def datasets_root() -> Path:
    """The folder that holds the data sets, read from the environment at every call."""
    return Path(os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()


@dataclass(frozen=True)
class Published:
    """Numbers that a data set's authors publish; the check compares with them.

    Attributes:
        pairs: Number of pairs, without the pairs that ``drop_mismatched`` drops.
        sizes: (width, height) in pixels of the images; empty where they vary.
        absent: Classes that the labels never hold; None where this is not known.
        shares: Percentage of all pixels, ignored pixels included, for some classes.
    """

    pairs: int
    sizes: tuple[tuple[int, int], ...] = ()
    absent: tuple[str, ...] | None = None
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DatasetMetadata:
    """A registered data set, apart from its files.

    Attributes:
        name: The name in Detectron2's catalogs.
        classes: The classes that the label map leads to; a model is trained on them.
        colors: Their RGB colours.
        label_map: A name in `LABEL_MAPS`.
        label_space: The classes that the data set is scored in.
        domain: Where and when the images were taken, as a path from the whole to its parts:
            "acdc/fog" is part of "acdc". A test set counts as source if training used its domain,
            a part of its domain, or a whole that contains its domain. Else it is unseen.
        test_size: (width, height) in pixels into which test images are fitted; the aspect ratio
            stays. None tests at the file's size.
        halve_labels: Whether labels of half the width and height are scored.
        published: Published numbers; None where there are none.
    """

    name: str
    classes: tuple[str, ...]
    colors: tuple[Color, ...]
    label_map: str
    label_space: LabelSpace
    domain: str
    test_size: tuple[int, int] | None = None
    halve_labels: bool = False
    published: Published | None = None


@dataclass(frozen=True, kw_only=True)
class SemSegDataset(DatasetMetadata):
    """A data set whose files FisherTune finds itself.

    The image ``image_dir/x/y<image suffix>`` belongs to the label ``label_dir/x/y<label suffix>``,
    at any depth of folders. A ``*`` in a folder's path stands for any one folder name; all folders
    that fit are read as one.

    Attributes:
        image_dir: Folder of the images, relative to the root.
        label_dir: Folder of the labels, relative to the root.
        other_dirs: Pairs of (image_dir, label_dir) where other projects or other releases keep the
            same files. The first pair of which both folders exist is read.
        image_suffixes: Endings of the images' names, in upper or lower case; several where copies
            of a data set differ. A single ending may be a string, and a file type may lack its dot.
        label_suffixes: Endings of the labels' names; several where kinds of labels are mixed.
        image_list: A text file, relative to the root, with one image per line: its path below the
            folder that holds ``image_dir``. None uses all images.
        keep: Picks files by their path below the folder without the suffix, as "x/y".
        drop_mismatched: Whether pairs of unequal size are dropped and counted, not refused.
        shift: A name in `SHIFTS` that changes each image as it is read; "" changes none.
        root: Finds the root folder when the data set is loaded.
    """

    image_dir: str
    label_dir: str
    other_dirs: tuple[tuple[str, str], ...] = ()
    image_suffixes: Sequence[str] = IMAGE_SUFFIXES
    label_suffixes: Sequence[str] = (".png",)
    image_list: str | None = None
    label_space: LabelSpace = LABEL_SPACES["cityscapes19"]
    keep: Callable[[str], bool] | None = None
    drop_mismatched: bool = False
    shift: str = ""
    root: Callable[[], Path] = datasets_root
    classes: tuple[str, ...] = CITYSCAPES_CLASSES
    colors: tuple[Color, ...] = CITYSCAPES_COLORS

    def __post_init__(self) -> None:
        """Brings the suffixes to one form; raises DatasetError if one ends no file's name."""
        for key in ("image_suffixes", "label_suffixes"):
            object.__setattr__(self, key, _suffixes(self.name, key, getattr(self, key)))

    def dirs(self) -> tuple[tuple[str, str], ...]:
        """Returns all pairs of (image_dir, label_dir), the authors' first."""
        return ((self.image_dir, self.label_dir), *self.other_dirs)

    def tree(self, root: Path) -> str:
        """Describes the folders that this data set needs below ``root``."""
        images = " or ".join(f"*{suffix}" for suffix in self.image_suffixes)
        labels = " or ".join(f"*{suffix}" for suffix in self.label_suffixes)
        text = "\nor\n".join(
            f"  {root / image_dir}/**/{images}    (images)\n"
            f"  {root / label_dir}/**/{labels}    (labels with {self.label_map!r} ids)"
            for image_dir, label_dir in self.dirs()
        )
        if self.image_list:
            text += f"\n  {root / self.image_list}    (the images to use)"
        return text


def _suffixes(name: str, key: str, given: object) -> tuple[str, ...]:
    """Checks endings of file names, and adds the dot of file types; "*.png" becomes ".png"."""
    suffixes = []
    for suffix in given if isinstance(given, Iterable) and not isinstance(given, str) else (given,):
        if isinstance(suffix, str):
            suffix = suffix.removeprefix("*")
            # Only a name without a dot asks Pillow for its file types: that imports its plugins.
            if "." not in suffix and f".{suffix}".lower() in Image.registered_extensions():
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
