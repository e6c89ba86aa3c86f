"""What is known of a registered data set, whoever registered it.

FisherTune's registrations say all of it. Of a data set that Detectron2's own functions register
(`load_sem_seg`, `register_coco_panoptic_separated`, its built-in names) ``stuff_classes`` and
``ignore_label`` say what the labels hold; its metadata may name a ``domain`` and a ``test_size``.
"""

from collections.abc import Iterable, Mapping, Sequence, Set, Sized
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import zip_longest
from numbers import Integral
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.colormap import colormap

from fishertune_d2.data.files import DatasetError
from fishertune_d2.data.labels import (
    IGNORE_LABEL,
    Color,
    LabelSpace,
    identity_map_name,
    identity_space,
    repeated,
    same_class,
)
from fishertune_d2.data.pairs import Published, SemSegDataset


@dataclass(frozen=True)
class DatasetMetadata:
    """What is known of a registered data set.

    Attributes:
        name: its name in Detectron2's catalogs.
        classes: the classes that its label map leads to, which a model is trained on.
        colors: their RGB colours.
        label_map: a name in `LABEL_MAPS`.
        label_space: the classes that it is scored in.
        domain: see `SemSegDataset`. A data set that says nothing is a domain of its own.
        test_size: (width, height) into which test images are fitted; None keeps their size.
        halve_labels: whether it is scored on labels of half the width and height.
        published: known numbers; None where there are none.
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


def dataset_metadata(name: str) -> DatasetMetadata:
    """Returns what is known of a data set, without looking at its files.

    Args:
        name: a name in Detectron2's catalogs.

    Raises:
        DatasetError: if no data set of that name is registered, or what was registered does not
            say which classes its labels hold.
    """
    require_registered(name)
    row = registered_row(name)
    if row is not None:
        return metadata_of(row)
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
    classes = tuple(classes)
    try:
        identity = identity_map_name(len(classes), known.get("ignore_label", IGNORE_LABEL))
    except ValueError as error:
        raise DatasetError(f"{name}: in its metadata, {error}.") from error
    colors = class_colors(len(classes), known.get("stuff_colors", ()))
    return DatasetMetadata(
        name,
        classes,
        colors,
        identity,
        identity_space(classes, colors),
        domain=known.get("domain", name),
        test_size=require_size(name, known.get("test_size")),
    )


def metadata_of(row: SemSegDataset) -> DatasetMetadata:
    """Returns what a row says.

    Args:
        row: registered or not.
    """
    return DatasetMetadata(
        row.name,
        row.classes,
        row.colors,
        row.label_map,
        row.label_space,
        row.domain,
        row.test_size,
        row.halve_labels,
        row.published,
    )


def registered_row(name: str) -> SemSegDataset | None:
    """Returns the row of a data set that FisherTune registered, else None.

    Args:
        name: a name in Detectron2's catalogs.
    """
    return MetadataCatalog.get(name).get("row", None)


def require_registered(name: str) -> None:
    """Refuses a name that is not registered.

    Args:
        name: of a data set, as DATASETS.TRAIN or DATASETS.TEST hold it.

    Raises:
        DatasetError: if it is not in Detectron2's catalog; it names the nearest names.
    """
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
    """Refuses names that are not in an order, no text or shared, and too many of them.

    Args:
        name: of the data set.
        classes: their names.

    Raises:
        DatasetError: if they are no list of texts, none or more than 255, or two have one name.
    """
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
    twice = repeated(classes)
    if twice:
        raise DatasetError(
            f"{name}: several classes are named {' and '.join(map(repr, twice))}; scores are told "
            "apart by the name, so give each class its own."
        )


def require_size(name: str, size: Any) -> tuple[int, int] | None:
    """Refuses a test_size into which no image can be fitted.

    Args:
        name: of the data set.
        size: (width, height) in pixels, or None.

    Returns:
        The same, as a tuple.

    Raises:
        DatasetError: if it is neither.
    """
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
        and all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in size)
    )


def require_same_classes(first: DatasetMetadata, other: DatasetMetadata) -> None:
    """Refuses data sets whose labels mean different classes, of which one model knows one.

    Args:
        first: the data set that says what the model's classes are.
        other: another one of the same run.

    Raises:
        DatasetError: names the first class in which they differ; spellings are no difference.
    """
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
    """Returns RGB colours: the given ones, or Detectron2's palette where they are too few.

    Args:
        count: how many are needed.
        given: RGB colours, 0 to 255.
    """
    if len(given) < count:
        palette = colormap(rgb=True).astype(int).tolist()
        given = [palette[k % len(palette)] for k in range(count)]
    return tuple((int(r), int(g), int(b)) for r, g, b in given[:count])
