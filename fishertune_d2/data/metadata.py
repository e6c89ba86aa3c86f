"""Metadata of registered data sets, whoever registered them, and checks of what users give.

Detectron2's own functions (`load_sem_seg`, `register_coco_panoptic_separated`, its built-in names)
set ``stuff_classes`` and ``ignore_label``, which tell the classes of the labels. The user may add a
``domain`` and a ``test_size``.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from difflib import get_close_matches
from itertools import zip_longest
from numbers import Integral
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.colormap import colormap

from fishertune_d2.data.dataset_description import DatasetMetadata, SemSegDataset
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.labels import (
    IGNORE_LABEL,
    Color,
    identity_map_name,
    identity_space,
    same_class,
)


def dataset_metadata(name: str) -> DatasetMetadata:
    """Returns the metadata of a registered data set, without looking at its files.

    They are a `SemSegDataset` if FisherTune registered it.

    Raises:
        DatasetError: if the name is not registered, or the registration does not say which classes
            the labels hold.
    """
    require_registered(name)
    dataset = registered_dataset(name)
    if dataset is not None:
        return dataset
    known = MetadataCatalog.get(name).as_dict()
    classes = known.get("stuff_classes")
    if classes is None or (isinstance(classes, Sized) and len(classes) == 0):
        instead = "only thing_classes, those of instances" if "thing_classes" in known else "none"
        raise DatasetError(
            f"{name}: its metadata have no stuff_classes, the names of the classes 0, 1, ... that "
            f"its label files hold ({instead}). If it has such files, name the classes with "
            f"MetadataCatalog.get({name!r}).set(stuff_classes=[...]); a data set of instances "
            "alone cannot be used."
        )
    require_classes(name, classes)
    try:
        identity = identity_map_name(len(classes), known.get("ignore_label", IGNORE_LABEL))
    except ValueError as error:
        raise DatasetError(f"{name}: in its metadata, {error}.") from error
    colors = class_colors(len(classes), known.get("stuff_colors", ()))
    return DatasetMetadata(
        name=name,
        classes=tuple(classes),
        colors=colors,
        label_map=identity,
        label_space=identity_space(classes, colors),
        domain=known.get("domain", name),
        test_size=require_size(name, known.get("test_size")),
    )


def registered_dataset(name: str) -> SemSegDataset | None:
    """Returns the description of a data set that FisherTune registered, else None."""
    return MetadataCatalog.get(name).get("sem_seg_dataset", None)


def require_registered(name: str) -> None:
    """Raises a DatasetError, with the nearest names, if no such data set is registered."""
    names = DatasetCatalog.list()
    if name in names:
        return
    near = get_close_matches(name, names)
    meant = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    raise DatasetError(
        f"No data set {name!r} is registered.{meant} DATASETS.TRAIN and DATASETS.TEST take the "
        "names that datasets/README.md lists; register your own data with register_sem_seg, in "
        "the script that then starts the training."
    )


def require_classes(name: str, classes: Sequence[str]) -> None:
    """Raises a DatasetError unless the classes are a list of 1 to 255 different names."""
    unordered = isinstance(classes, str | Set | Mapping)
    if unordered or not (isinstance(classes, Sized) and isinstance(classes, Iterable)):
        raise DatasetError(
            f"{name}: classes is {classes!r}, but has to be a list of the classes' names, in the "
            "order of their ids in the label files, as ['path', 'grass']."
        )
    if not 1 <= len(classes) <= IGNORE_LABEL:
        raise DatasetError(f"{name}: {len(classes)} classes given; labels hold 1 to 255 classes.")
    for k, one in enumerate(classes):
        if not isinstance(one, str) or not one.strip():
            raise DatasetError(
                f"{name}: class {k} is named {one!r}, but scores are reported by names: give a "
                "text that is not blank."
            )
    twice = [text for text, count in Counter(classes).items() if count > 1]
    if twice:
        raise DatasetError(
            f"{name}: several classes are named {' and '.join(map(repr, twice))}; scores are told "
            "apart by the name, so give each class its own."
        )


def require_size(name: str, size: Any) -> tuple[int, int] | None:
    """Returns a test_size as a tuple; raises a DatasetError unless it is a size or None."""
    if size is None:
        return None
    if not is_size(size):
        raise DatasetError(
            f"{name}: test_size is {size!r}: give (width, height) in whole pixels, as (1024, 512), "
            "or None, which tests at the size of the files."
        )
    width, height = size
    return int(width), int(height)


def is_size(size: Any) -> bool:
    """Whether something is a pair of positive whole numbers."""
    return (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0 for n in size)
    )


def require_same_classes(first: DatasetMetadata, other: DatasetMetadata) -> None:
    """Raises a DatasetError, with the first difference, if two data sets have different classes."""
    pairs = zip_longest(first.classes, other.classes)
    for k, (one, another) in enumerate(pairs):
        if one is None or another is None or not same_class(one, another):
            names = ["nothing" if name is None else repr(name) for name in (one, another)]
            raise DatasetError(
                f"{first.name} and {other.name} have different classes ({len(first.classes)} and "
                f"{len(other.classes)}: class {k} is {names[0]} in {first.name} and {names[1]} in "
                f"{other.name}); one model cannot be trained and scored on both. Register both "
                "with the same classes in the same order, and number the ids of their label files "
                "alike."
            )


def class_colors(count: int, given: Sequence[Sequence[int]] = ()) -> tuple[Color, ...]:
    """Returns RGB colours: the given ones, or Detectron2's palette if fewer than ``count``."""
    if len(given) < count:
        palette = colormap(rgb=True).astype(int).tolist()
        given = [palette[k % len(palette)] for k in range(count)]
    return tuple((int(r), int(g), int(b)) for r, g, b in given[:count])
