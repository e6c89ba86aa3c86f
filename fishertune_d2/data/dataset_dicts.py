"""Loads registered data sets as lists of dicts, whoever registered them."""

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog

from fishertune_d2.data.image_files import DatasetError, image_header
from fishertune_d2.data.metadata import (
    dataset_metadata,
    registered_dataset,
    require_same_classes,
)


def load_datasets(names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the dicts of registered data sets of the same classes, one after the other.

    Dicts of data sets that Detectron2's own functions register get the form of `load_pairs`;
    missing heights and widths are read from the headers of the labels.

    Raises:
        TypeError: if ``names`` is one string.
    """
    if isinstance(names, str):
        raise TypeError(f"names is a list of data set names, got the string {names!r}")
    dicts: list[dict[str, Any]] = []
    for name in names:
        require_same_classes(dataset_metadata(names[0]), dataset_metadata(name))
        dicts += DatasetCatalog.get(name) if registered_dataset(name) else _load_stock(name)
    return dicts


def _load_stock(name: str) -> list[dict[str, Any]]:
    """Loads a data set that FisherTune has not registered."""
    try:
        items = DatasetCatalog.get(name)
    except (OSError, AssertionError, ImportError) as error:  # Detectron2's own functions raise them
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
    """Raises unless each entry is a dict that names an image file and a label file."""
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
    header = image_header(item["sem_seg_file_name"])
    return {"height": header.height, "width": header.width}
