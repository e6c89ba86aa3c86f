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
from fishertune_d2.data.protocols import Protocol
from fishertune_d2.run import Run, RunError

logger = logging.getLogger(__name__)

Size = tuple[int, int]  # (width, height) in pixels


def registered_space(cfg: CfgNode) -> tuple[LabelSpace, Size | None] | None:
    """Returns the label space and test size of the first registered data set that names classes.

    DATASETS.TEST comes before DATASETS.TRAIN. None if there is no such data set.

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
        chosen = Protocol.from_config(cfg).sizes_of([name])
        return data.label_space, chosen.get(name, data.test_size)
    return None


def recorded_space(
    cfg: CfgNode, trained: Sequence[str] | None = None
) -> tuple[LabelSpace, Size | None]:
    """Returns the label space and test size that a model's run recorded.

    ``trained`` are the names of the trained classes, if the checkpoint holds them. Else
    results.json names the scored classes. Without it, classes get numbers.
    """
    count, names = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES, _names(cfg)
    protocol, path = _protocol(cfg)
    recorded = protocol.get("classes", {})
    name = next((name for name in names if name in recorded), names[0] if names else "")
    chosen = Protocol.from_config(cfg).sizes_of([name])
    size = chosen.get(name, protocol.get("test_size", {}).get(name))
    classes = trained or recorded.get(name)
    listed = ", ".join(names) or "it names none"
    where = "the checkpoint" if trained else path
    if classes and len(classes) == count:
        logger.info(f"No data set ({listed}) is registered here: {where} names the classes")
    else:
        others = (
            f"{where} names the {len(classes)} classes in which {name} was scored, and the model "
            f"has {count}; "
            if classes
            else ""
        )
        logger.warning(
            f"No data set of the config ({listed}) is registered here, so classes have numbers "
            f"instead of names: {others}call register_sem_seg first"
        )
        classes = [f"class {k}" for k in range(count)]
    known = all(each in CITYSCAPES for each in classes)
    palette = [CITYSCAPES[each] for each in classes] if known else class_colors(count)
    return identity_space(classes, palette), (size[0], size[1]) if size else None


def _names(cfg: CfgNode) -> list[str]:
    return [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]


def _protocol(cfg: CfgNode) -> tuple[Mapping[str, Any], Path | None]:
    """Reads the protocol in a results.json beside MODEL.WEIGHTS or in OUTPUT_DIR, and its path."""
    for folder in (Path(cfg.MODEL.WEIGHTS).parent, Path(cfg.OUTPUT_DIR)):
        run = Run(folder)
        with suppress(RunError):
            if run.results is not None:
                return run.results.protocol, run.results_file
    return {}, None
