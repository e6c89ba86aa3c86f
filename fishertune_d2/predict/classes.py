"""Names, colours and test size of a model's classes: as registered, or as its run wrote them down.

A data set that only a script registers is not known to another process. The run that was trained on
it knows its classes all the same.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog

from fishertune_d2.data import DatasetError
from fishertune_d2.data.labels import CITYSCAPES, LabelSpace, identity_space
from fishertune_d2.data.metadata import class_colors, dataset_metadata

logger = logging.getLogger(__name__)

Size = tuple[int, int]


def registered_space(cfg: CfgNode) -> tuple[LabelSpace, Size | None] | None:
    """The first data set of the config that is registered and says which classes it has.

    Args:
        cfg: DATASETS.TEST goes before DATASETS.TRAIN.

    Returns:
        Its label space and test size, (width, height); None if there is no such data set.

    Raises:
        ValueError: if it has another number of classes than the model.
    """
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    for name in (name for name in _names(cfg) if name in DatasetCatalog):
        try:
            data = dataset_metadata(name)
        except DatasetError as error:
            logger.warning("The classes have no names of %s", error)
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
    """What the run that trained a model wrote down of its data sets; numbers where it did not.

    Args:
        cfg: results.json is looked for beside MODEL.WEIGHTS and in OUTPUT_DIR.
        trained: the names of the trained classes, if the checkpoint knows them; else results.json
            says which classes were scored.
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
                f"{where} names {len(classes)} classes, those that {name} was scored in, and the "
                f"model has {count}; {why}"
            )
        logger.warning(
            "No data set of the config (%s) is registered here, so classes have numbers in place "
            "of names: %s",
            listed,
            why,
        )
        classes = [f"class {k}" for k in range(count)]
    palette = class_colors(count)
    if all(each in CITYSCAPES for each in classes):
        palette = [CITYSCAPES[each] for each in classes]
    return identity_space(classes, palette), tuple(size) if size else None


def _names(cfg: CfgNode) -> list[str]:
    return [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]


def _sizes(cfg: CfgNode) -> dict[str, Size]:
    return {name: (width, height) for name, width, height in cfg.TEST.SIZES}


def _protocol(cfg: CfgNode) -> tuple[dict[str, Any], Path | None]:
    """How the run scored its data sets, and the file that says it; empty if none does."""
    for folder in (Path(cfg.MODEL.WEIGHTS).parent, Path(cfg.OUTPUT_DIR)):
        path = folder / "results.json"
        try:
            protocol = json.loads(path.read_text())["protocol"]
        except (OSError, ValueError, KeyError, TypeError):  # not there, or not a run's
            continue
        if isinstance(protocol, dict):
            return protocol, path
    return {}, None
