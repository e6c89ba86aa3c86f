"""Registers the data sets in Detectron2's catalogs, and the user's own data sets.

Importing registers `DATASETS`. The disk is read when a data set is first loaded, below the folder
that the environment variable DETECTRON2_DATASETS names (default: ``datasets``).
"""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog

from fishertune_d2.data.dataset_description import IMAGE_SUFFIXES, SemSegDataset
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.held_out import HELD_OUT
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.labels import IGNORE_LABEL, Color, identity_map_name, identity_space
from fishertune_d2.data.load_pairs import load_pairs
from fishertune_d2.data.metadata import (
    class_colors,
    registered_dataset,
    require_classes,
    require_size,
)


def register(dataset: SemSegDataset, ignore_label: int = IGNORE_LABEL) -> None:
    """Enters a data set into Detectron2's catalogs; replaces an earlier one of the same name.

    Detectron2's own tools, which know nothing of label maps, ignore the id ``ignore_label``.

    Raises:
        DatasetError: if another package has registered the name.
    """
    if dataset.name in DatasetCatalog.list():
        if registered_dataset(dataset.name) is None:
            raise DatasetError(
                f"The data set name {dataset.name!r} is taken by another package; choose another."
            )
        DatasetCatalog.remove(dataset.name)
        MetadataCatalog.remove(dataset.name)
    DatasetCatalog.register(dataset.name, lambda: load_pairs(dataset))
    MetadataCatalog.get(dataset.name).set(
        stuff_classes=list(dataset.classes),
        stuff_colors=[list(color) for color in dataset.colors],
        ignore_label=ignore_label,
        evaluator_type="sem_seg",
        sem_seg_dataset=dataset,
        domain=dataset.domain,
        label_space=dataset.label_space,
        test_size=dataset.test_size,
        halve_labels=dataset.halve_labels,
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
    """Registers a folder of images and a folder of labels, so that configs can name them.

    Labels are images of one channel (grey or palette) that hold 0 to ``len(classes) - 1``, and
    255 for ignored pixels. Set MODEL.SEM_SEG_HEAD.NUM_CLASSES to ``len(classes)``.

    Args:
        name: The name to use in DATASETS.TRAIN or DATASETS.TEST.
        image_dir: Folder of the images; folders inside it are searched too.
        label_dir: Folder of the labels, with the same folders inside.
        classes: Name of each class id.
        image_suffixes: Endings of the images' names.
        label_suffix: Ending of the labels' names: "a_rgb.png" and "a_mask.png" are a pair with
            ``image_suffixes=["_rgb.png"]`` and ``label_suffix="_mask.png"``.
        colors: RGB colour of each class for pictures.
        domain: Test sets of the domain trained on count as source, others as unseen. By default
            the data set is a domain of its own. "city/night" is part of the domain "city".
        test_size: (width, height) into which test images are fitted; None keeps their size.
        ignore_label: An id of the label files that training and scoring ignore, in addition to
            255. It may be the id of a class: if 0 means "unlabelled", name it in ``classes`` all
            the same; class 0 is then never trained on and never scored.

    Raises:
        DatasetError: if the number of colours or classes does not fit, the classes are no list of
            different names, the test size is no pair of whole pixels, or the name is taken.
    """
    require_classes(name, classes)
    size = require_size(name, test_size)
    rgb = class_colors(len(classes), colors or ())
    if colors is not None and len(colors) != len(classes):
        raise DatasetError(f"{name}: {len(colors)} colors given for {len(classes)} classes.")
    dataset = SemSegDataset(
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
    )
    register(dataset, ignore_label)


for _dataset in chain(DATASETS, *HELD_OUT.values()):
    register(_dataset)
