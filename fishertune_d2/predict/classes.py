"""Names, colours and test size of a model's classes, from a registered data set or from its run.

A data set that a script registers is unknown to other processes, but its run records its classes.
"""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from fishertune_d2.data import DatasetError
from fishertune_d2.data.labels import CITYSCAPES, LabelSpace, identity_space
from fishertune_d2.data.metadata import class_colors, dataset_metadata
from fishertune_d2.run import Run, RunError

logger = logging.getLogger(__name__)

Size = tuple[int, int]


def registered_space(cfg: CfgNode) -> tuple[LabelSpace, Size | None] | None:
    """Reads the classes of the first data set of the config that is registered and names them.

    Args:
        cfg: DATASETS.TEST comes before DATASETS.TRAIN.

    Returns:
        Its label space and test size, (width, height); None if there is no such data set.

    Raises:
        ValueError: if its number of classes differs from the model's.
    """
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in (name for name in _names(cfg) if name in DatasetCatalog):
        try:
            data = dataset_metadata(name)
        except DatasetError as error:
            logger.warning("No names of classes from %s", error)
            continue
        if len(data.classes) != count:
            raise ValueError(
                f"{name} has {len(data.classes)} classes and MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
                f"{count}: set DATASETS.TEST to a data set with the model's classes"
            )
        return data.label_space, _sizes(cfg).get(name, data.test_size)
    return None


def recorded_space(
    cfg: CfgNode, trained: Sequence[str] | None = None
) -> tuple[LabelSpace, Size | None]:
    """Reads the classes that the run of a model recorded; without a record they get numbers.

    Args:
        cfg: results.json is searched beside MODEL.WEIGHTS and in OUTPUT_DIR.
        trained: the names of the trained classes, if the checkpoint holds them; else those of the
            scored classes in results.json are read.

    Returns:
        The label space, and the test size (width, height) or None.
    """
    count, names = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, _names(cfg)
    protocol, path = _protocol(cfg)
    recorded = protocol.get("classes", {})
    name = next((name for name in names if name in recorded), names[0] if names else "")
    size = _sizes(cfg).get(name, protocol.get("test_size", {}).get(name))
    classes = trained or recorded.get(name)
    listed = ", ".join(names) or "it names none"
    where = "the checkpoint" if trained else path
    if classes and len(classes) == count:
        logger.info("No data set (%s) is registered here: %s names the classes", listed, where)
    else:
        why = "call register_sem_seg first"
        if classes:
            why = (
                f"{where} names the {len(classes)} classes in which {name} was scored, and the "
                f"model has {count}; {why}"
            )
        logger.warning(
            "No data set of the config (%s) is registered here, so classes have numbers instead "
            "of names: %s",
            listed,
            why,
        )
        classes = [f"class {k}" for k in range(count)]
    known = all(each in CITYSCAPES for each in classes)
    palette = [CITYSCAPES[each] for each in classes] if known else class_colors(count)
    return identity_space(classes, palette), (size[0], size[1]) if size else None


def _names(cfg: CfgNode) -> list[str]:
    return [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]


def _sizes(cfg: CfgNode) -> dict[str, Size]:
    return {name: (width, height) for name, width, height in cfg.TEST.SIZES}


def _protocol(cfg: CfgNode) -> tuple[Mapping[str, Any], Path | None]:
    """Reads the protocol of the run's scores, and its file; empty without a whole file."""
    for folder in (Path(cfg.MODEL.WEIGHTS).parent, Path(cfg.OUTPUT_DIR)):
        run = Run(folder)
        with suppress(RunError):
            if run.results is not None:
                return run.results.protocol, run.results_file
    return {}, None
