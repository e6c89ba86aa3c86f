"""Registers the data sets in Detectron2's catalogs, and a person's own beside them.

The rows of `DATASETS` are registered at import; the disk is looked at when a data set is first
loaded, below the folder that the environment variable DETECTRON2_DATASETS names (default:
``datasets``).
"""

from collections.abc import Sequence
from pathlib import Path

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils.colormap import colormap

from fishertune_d2.data.files import DatasetError
from fishertune_d2.data.labels import IGNORE_LABEL, Color, identity_space
from fishertune_d2.data.pairs import IMAGE_SUFFIXES, SemSegDataset, load_pairs
from fishertune_d2.data.rows import DATASETS


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
            label_suffixes=(label_suffix,),
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


for _row in DATASETS:
    register(_row)
