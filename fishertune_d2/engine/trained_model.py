"""Builds a trained model for scoring and prediction, with every tensor from its checkpoint.

``--eval-only``, ``bench`` and ``predict`` all load a model through this module.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.config import changed
from fishertune_d2.data import dataset_metadata
from fishertune_d2.tuning import build_tuning_method

from .checkpoint import WholeCheckpointer
from .parameter_counts import WITHOUT_WEIGHTS
from .run_record import RunRecord, remember_run, texts_of
from .start_check import require_device, require_file


def build_trained(
    cfg: CfgNode, weights: str, build: Callable[[CfgNode], nn.Module] = build_model
) -> nn.Module:
    """Builds the model of a config and fills it from a checkpoint.

    The model remembers the run that trained it: its attribute ``trained_by`` is the checkpoint's
    :class:`RunRecord`, or None if the checkpoint has none.

    Args:
        cfg: its MODEL.DEVICE must be there, and its model must compute the same as in training.
        weights: a checkpoint of the whole model.
        build: builds the model; Detectron2's ``build_model``, or a trainer's.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: if the checkpoint's run had other settings that change predictions, or the
            checkpoint does not fill the model.
    """
    require_device(cfg.MODEL.DEVICE)
    require_file("MODEL.WEIGHTS", weights)
    method = build_tuning_method(cfg)
    with _silent_about_random_weights():  # the checkpoint holds all weights
        model = build(changed(cfg, [*WITHOUT_WEIGHTS, *_without_public_copy(cfg)]))
    remember_run(model, None)

    def accept(record: RunRecord) -> None:
        registered = [name for name in cfg.DATASETS.TEST if name in DatasetCatalog]
        classes = {name: dataset_metadata(name).classes for name in registered}
        record.require_same_predictions(cfg, classes, texts_of(model))
        remember_run(model, record)

    checkpointer = WholeCheckpointer(model, method=method, accept=accept, complete=True)
    try:
        checkpointer.load(weights, checkpointables=[])
    except (OSError, ValueError) as error:  # an OSError of an address
        raise ValueError(f"MODEL.WEIGHTS {weights}: {error}") from error
    return model.eval()


def _without_public_copy(cfg: CfgNode) -> list:
    """Options without the copy of the public weights, with which only a training compares."""
    features = [name for name in cfg.MODEL.VFM.OUT_FEATURES if name != "clip_global_frozen"]
    return ["MODEL.VFM.OUT_FEATURES", features, "MODEL.TEXT.VISION_WEIGHT", 0.0]


def find_weights(cfg: CfgNode, resume: bool) -> str:
    """The checkpoint that ``--eval-only`` scores; refuses a config that names none."""
    if resume:  # take the last checkpoint in OUTPUT_DIR if there is one, as Detectron2 does
        checkpointer = WholeCheckpointer(nn.Identity(), cfg.OUTPUT_DIR)
        if checkpointer.has_checkpoint():
            return checkpointer.get_checkpoint_file()
    if not cfg.MODEL.WEIGHTS:
        own = Path(cfg.OUTPUT_DIR, "model_final.pth")
        raise ValueError(
            "MODEL.WEIGHTS is empty, so random weights would be scored: add MODEL.WEIGHTS "
            f"{own if own.is_file() else 'FILE, the checkpoint of a run'}, or --resume for the "
            f"last checkpoint in OUTPUT_DIR {cfg.OUTPUT_DIR}"
        )
    return cfg.MODEL.WEIGHTS


@contextmanager
def _silent_about_random_weights() -> Iterator[None]:
    """Silences the warnings about random weights, because the checkpoint replaces them all."""
    rooms = ("public_weights", "text_tower")
    logs = [logging.getLogger(f"fishertune_d2.modeling.{room}") for room in rooms]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
