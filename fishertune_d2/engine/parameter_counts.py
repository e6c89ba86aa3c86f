"""Counts the weights that a config trains, before any data or pretrained weights are needed."""

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import nn

from fishertune_d2.config import changed
from fishertune_d2.fisher import count_of_share
from fishertune_d2.tuning import build_tuning_method

from .stages import attach, planned_share

# The options with which a model is built without its public weights.
WITHOUT_WEIGHTS = ("MODEL.VFM.WEIGHTS", "random", "MODEL.TEXT.WEIGHTS", "random")

logger = logging.getLogger(__name__)


def count_parameters(
    cfg: CfgNode, backbone: nn.Module | None = None, iterations: int | None = None
) -> dict[str, int]:
    """Counts the backbone's own weights and those that have trained.

    Args:
        cfg: MODEL, SOLVER.MAX_ITER and TUNING are read.
        backbone: the backbone of this config; by default it is built without its weights.
        iterations: how many iterations are done; None for all.

    Returns:
        ``tuned_parameters`` and ``backbone_parameters``. With TUNING.UNIT neuron the former is the
        most that may be tuned: a selection has room left for less than one neuron.
    """
    if backbone is None:
        backbone = build_empty(cfg, build_backbone)
    first, last = cfg.TUNING.WARMUP_ITERS, cfg.SOLVER.MAX_ITER - 1
    latest = last if iterations is None else iterations - 1
    progress = min(1.0, max(0, latest - first) / max(1, last - first))
    # A run that is planned with no iteration of tuning is counted as if it had some.
    begun = iterations is None or latest >= first
    return {
        "tuned_parameters": count_tuned(cfg, backbone, progress) if begun else 0,
        "backbone_parameters": sum(p.numel() for p in backbone.parameters()),
    }


def count_tuned(cfg: CfgNode, backbone: nn.Module, progress: float) -> int:
    """Counts the tuned backbone weights, or the added ones, at ``progress`` from 0 to 1."""
    method = build_tuning_method(cfg)
    if method.adds:  # to another model, because what is added may need the head
        model = build_empty(cfg, build_model)
        attach(model, method)
        backbone = model.get_submodule("backbone")
    if not method.selects:
        return sum(p.numel() for p in method.parameters(backbone).values())
    base = sum(p.numel() for p in backbone.parameters())
    return count_of_share(planned_share(cfg, progress), base)


def build_empty(cfg: CfgNode, build: Callable[[CfgNode], nn.Module]) -> nn.Module:
    """Builds a module on the meta device: shapes without numbers, and no weights file is read."""
    with torch.device("meta"):
        return build(changed(cfg, [*WITHOUT_WEIGHTS, "MODEL.DEVICE", "meta"]))


def log_plan(cfg: CfgNode) -> dict[str, int]:
    """Logs and returns :func:`count_parameters` of a config."""
    counts = count_parameters(cfg)
    adds = build_tuning_method(cfg).adds
    logger.info(
        "%s on %s: %.2f M weights will be added to the backbone's %.2f M (%s to %s)"
        if adds
        else "%s on %s: %.2f M of %.2f M backbone weights will be tuned (%s of %s)",
        cfg.TUNING.METHOD,
        cfg.MODEL.VFM.NAME,
        counts["tuned_parameters"] / 1e6,
        counts["backbone_parameters"] / 1e6,
        f"{counts['tuned_parameters']:,}",
        f"{counts['backbone_parameters']:,}",
    )
    return counts
