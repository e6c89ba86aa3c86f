"""Builds a trained model for scoring and prediction: every tensor is the checkpoint's, or none is.

The one door through which ``--eval-only``, ``bench`` and ``predict`` load a model.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.data import dataset_metadata
from fishertune_d2.tuning import build_tuning_method

from .checkpoint import WholeCheckpointer
from .run_record import RunRecord
from .start_check import require_file


def build_trained(
    cfg: CfgNode, weights: str, build: Callable[[CfgNode], nn.Module] = build_model
) -> nn.Module:
    """Builds the model of a config and fills it from a checkpoint.

    The model remembers the run that trained it: its attribute ``trained_by`` is the checkpoint's
    :class:`RunRecord`, or None if the checkpoint has none.

    Args:
        cfg: with it the model has to compute what it computed in training.
        weights: a checkpoint of the whole model.
        build: builds the model; Detectron2's ``build_model``, or a trainer's.

    Returns:
        The model in evaluation mode.

    Raises:
        FileNotFoundError: if the checkpoint is not there.
        ValueError: if MODEL.DEVICE is not there, the checkpoint's run had other settings that
            change predictions, or the checkpoint does not fill the model.
    """
    require_device(cfg.MODEL.DEVICE)
    require_file("MODEL.WEIGHTS", weights)
    method = build_tuning_method(cfg)
    empty = cfg.clone()
    empty.defrost()
    empty.MODEL.VFM.WEIGHTS = "random"  # the checkpoint holds the backbone's weights
    with _without_word_of_random_weights():
        model = build(empty)
    model.trained_by = None

    def accept(record: RunRecord) -> None:
        record.require_same_predictions(cfg, _classes_of(cfg))
        model.trained_by = record

    checkpointer = WholeCheckpointer(model, method=method, accept=accept, complete=True)
    try:
        checkpointer.load(weights, checkpointables=[])
    except (OSError, ValueError) as error:  # an OSError of an address
        raise ValueError(f"MODEL.WEIGHTS {weights}: {error}") from error
    return model.eval()


def find_weights(cfg: CfgNode, resume: bool) -> str:
    """The checkpoint that ``--eval-only`` scores.

    Args:
        cfg: MODEL.WEIGHTS and OUTPUT_DIR are read.
        resume: take the last checkpoint in OUTPUT_DIR if there is one, as Detectron2 does.

    Raises:
        ValueError: if the config names none.
    """
    if resume:
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


def require_device(device: str) -> None:
    """Refuses a device that PyTorch does not find.

    Raises:
        ValueError: with the remedy.
    """
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {device!r}: choose cuda, cuda:1 or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {device!r}, and PyTorch finds no GPU: add MODEL.DEVICE cpu to the "
            "command (--opts MODEL.DEVICE cpu for predict), or run python -m fishertune_d2.doctor"
        )


def _classes_of(cfg: CfgNode) -> dict[str, tuple[str, ...]]:
    """The names of the classes of the test sets, where a test set is registered here."""
    names = [name for name in cfg.DATASETS.TEST if name in DatasetCatalog]
    return {name: dataset_metadata(name).classes for name in names}


@contextmanager
def _without_word_of_random_weights() -> Iterator[None]:
    """Silences the warning about random weights: the checkpoint replaces all of them."""
    log = logging.getLogger("fishertune_d2.modeling.public_weights")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
