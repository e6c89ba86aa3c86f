"""Registers the data sets in Detectron2's catalogs, and a person's own beside them.

The rows of `DATASETS` are registered at import; the disk is looked at when a data set is first
loaded, below the folder that the environment variable DETECTRON2_DATASETS names (default:
``datasets``).
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog

from fishertune_d2.data.files import DatasetError, image_size
from fishertune_d2.data.labels import IGNORE_LABEL, Color, identity_map_name, identity_space
from fishertune_d2.data.metadata import (
    class_colors,
    dataset_metadata,
    registered_row,
    require_classes,
    require_same_classes,
    require_size,
)
from fishertune_d2.data.pairs import IMAGE_SUFFIXES, SemSegDataset, load_pairs
from fishertune_d2.data.rows import DATASETS


def register(row: SemSegDataset, ignore_label: int = IGNORE_LABEL) -> None:
    """Enters a row into Detectron2's catalogs, in place of an earlier row of that name.

    Args:
        row: the data set.
        ignore_label: an id of its files that Detectron2's own tools, which know nothing of label
            maps, have to ignore.

    Raises:
        DatasetError: if the name is taken by a data set that is not FisherTune's.
    """
    if row.name in DatasetCatalog.list():
        if registered_row(row.name) is None:
            raise DatasetError(
                f"The data set name {row.name!r} is taken by another package; choose another."
            )
        DatasetCatalog.remove(row.name)
        MetadataCatalog.remove(row.name)
    DatasetCatalog.register(row.name, lambda: load_pairs(row))
    MetadataCatalog.get(row.name).set(
        stuff_classes=list(row.classes),
        stuff_colors=[list(color) for color in row.colors],
        ignore_label=ignore_label,
        evaluator_type="sem_seg",
        row=row,
        domain=row.domain,
        label_space=row.label_space,
        test_size=row.test_size,
        halve_labels=row.halve_labels,
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
    ignore_label: int = IGNORE_LABEL,
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
            the data set is a domain of its own. "city/night" is part of the domain "city".
        test_size: (width, height) into which test images are fitted; None keeps their size.
        ignore_label: an id of the label files that is ignored in training and scoring, beside
            255. It may be that of a class: if 0 is "unlabelled", name it in ``classes`` all the
            same, and class 0 is never trained on and never scored.

    Raises:
        DatasetError: if the number of classes or colours does not fit, the classes are no list of
            different names, the test size is no pair of whole pixels, or the name is taken.
        ValueError: if ``ignore_label`` is no id from 0 to 255.
    """
    require_classes(name, classes)
    size = require_size(name, test_size)
    if colors is None:
        colors = class_colors(len(classes))
    if len(colors) != len(classes):
        raise DatasetError(f"{name}: {len(colors)} colors given for {len(classes)} classes.")
    rgb = tuple((int(r), int(g), int(b)) for r, g, b in colors)
    register(
        SemSegDataset(
            name=name,
            image_dir=str(Path(image_dir).expanduser()),
            label_dir=str(Path(label_dir).expanduser()),
            label_map=identity_map_name(len(classes), ignore_label),
            domain=domain or name,
            image_suffixes=image_suffixes,
            label_suffixes=label_suffix,
            label_space=identity_space(classes, rgb),
            test_size=size,
            root=Path.cwd,
            classes=tuple(classes),
            colors=rgb,
        ),
        ignore_label,
    )


def load_datasets(names: Sequence[str]) -> list[dict]:
    """Loads registered data sets one after the other into one list.

    The dicts of a data set that Detectron2's own functions register are brought to the form of
    `load_pairs`: heights and widths that are missing are read from the headers of the labels.

    Raises:
        DatasetError: if a name is not registered, files are missing or do not fit, or the data
            sets differ in classes.
    """
    if isinstance(names, str):
        raise TypeError(f"names is a list of data set names, got the string {names!r}")
    dicts: list[dict] = []
    for name in names:
        require_same_classes(dataset_metadata(names[0]), dataset_metadata(name))
        dicts += _load(name)
    return dicts


def _load(name: str) -> list[dict[str, Any]]:
    """Loads one data set, whoever registered it."""
    if registered_row(name) is not None:
        return DatasetCatalog.get(name)
    try:
        items = DatasetCatalog.get(name)
    except (OSError, AssertionError, ImportError) as error:  # what Detectron2's own functions raise
        raise DatasetError(
            f"{name}: the function that was registered for it fails with {type(error).__name__}: "
            f"{error}. Put the files where it looks for them; Detectron2's own data sets lie below "
            "the folder that DETECTRON2_DATASETS names."
        ) from error
    if not isinstance(items, Iterable):
        raise DatasetError(
            f"{name}: the function that was registered for it returns {items!r}, and not a list of "
            "dicts."
        )
    items = list(items)
    _require_pairs(name, items)
    known = dataset_metadata(name)
    return [
        {
            "image_id": os.path.splitext(item["file_name"])[0],
            **_stated_or_read_size(item),
            **item,
            "dataset_name": name,
            "label_map": known.label_map,
            "test_size": known.test_size,
            "halve_label": known.halve_labels,
        }
        for item in items
    ]


def _require_pairs(name: str, items: Sequence[Any]) -> None:
    """Refuses what others' functions return if it is not a dict with two files for each image."""
    if not items:
        raise DatasetError(f"{name}: the function that was registered for it returns no image.")
    others = [item for item in items if not isinstance(item, Mapping)]
    if others:
        raise DatasetError(
            f"{name}: an entry is {others[0]!r}, and not a dict with a file_name and a "
            "sem_seg_file_name, the paths of an image and its label. Correct the function that was "
            "registered for it."
        )
    nameless = sum(not item.get("file_name") for item in items)
    if nameless:
        raise DatasetError(
            f"{name}: {nameless} of {len(items)} entries have no file_name, the path of an image. "
            "Correct the function that was registered for it; images in memory cannot be used."
        )
    unlabelled = [item["file_name"] for item in items if not item.get("sem_seg_file_name")]
    if unlabelled:
        raise DatasetError(
            f"{name}: {len(unlabelled)} of {len(items)} images have no sem_seg_file_name, a file "
            f"with the class of each pixel, the first of them {unlabelled[0]}. A data set of "
            "instances or of panoptic segments alone cannot be used; coco_..._separated and "
            "coco_..._stuffonly have such files."
        )


def _stated_or_read_size(item: dict[str, Any]) -> dict[str, int]:
    if "height" in item and "width" in item:
        return {}
    height, width = image_size(item["sem_seg_file_name"])
    return {"height": height, "width": width}


for _row in DATASETS:
    register(_row)
