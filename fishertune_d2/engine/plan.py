"""What a config will train, said before any data or weights are needed."""

import logging
from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone, build_model
from torch import nn

from fishertune_d2.fisher import count_of_share, tuned_share
from fishertune_d2.tuning import build_tuning_method

from .stages import attach

logger = logging.getLogger(__name__)


def count_parameters(
    cfg: CfgNode, backbone: nn.Module, iterations: int | None = None
) -> dict[str, int]:
    """How many weights the backbone has of its own, and how many have trained.

    Args:
        cfg: SOLVER.MAX_ITER and TUNING are read.
        backbone: as the config builds it.
        iterations: how many are done; None for all.
    """
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
    """How many weights of the backbone train at a point of the tuning stage, from 0 to 1.

    Of a method that adds weights, those.
    """
    method = build_tuning_method(cfg)
    if method.adds:
        # To a model of its own: ``backbone`` stays as it is, and what is added may need the head.
        model = build_empty(cfg, build_model)
        attach(model, method)
        backbone = model.backbone
    if not method.selects:
        return sum(p.numel() for p in method.parameters(backbone).values())
    tuning = cfg.TUNING
    schedule = method.schedule or tuning.SCHEDULE
    share = tuned_share(progress, tuning.D_MIN, tuning.D_MAX, form=schedule)
    return count_of_share(share, sum(p.numel() for p in backbone.parameters()))


def build_empty(cfg: CfgNode, build: Callable[[CfgNode], nn.Module]) -> nn.Module:
    """What ``build(cfg)`` builds, on the meta device: shapes without numbers, and no weights file.

    Args:
        cfg: stays as it is.
        build: Detectron2's ``build_model`` or ``build_backbone``.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.VFM.WEIGHTS = "random"
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build(cfg)


def plan(cfg: CfgNode, iterations: int | None = None) -> dict[str, int]:
    """:func:`count_parameters` of the config's backbone, without its weights."""
    return count_parameters(cfg, build_empty(cfg, build_backbone), iterations)


def log_plan(cfg: CfgNode) -> dict[str, int]:
    """Logs and returns :func:`plan`."""
    counts = plan(cfg)
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
