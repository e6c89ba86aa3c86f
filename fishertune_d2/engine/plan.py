"""What a config will train, said before any data or weights are needed."""

import logging

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_backbone
from torch import nn

from fishertune_d2.fisher import count_of_share, tuned_share
from fishertune_d2.tuning import build_tuning_method

logger = logging.getLogger(__name__)


def count_parameters(cfg: CfgNode, backbone: nn.Module) -> dict[str, int]:
    """How many weights the backbone has, and how many of them TUNING lets move by the end."""
    total = sum(p.numel() for p in backbone.parameters())
    method = build_tuning_method(cfg)
    if method.selects:
        tuning = cfg.TUNING
        share = tuned_share(1.0, tuning.D_MIN, tuning.D_MAX, form=tuning.SCHEDULE)
        tuned = count_of_share(share, total)
    else:
        tuned = sum(p.numel() for p in method.parameters(backbone).values())
    return {"tuned_parameters": tuned, "backbone_parameters": total}


def plan(cfg: CfgNode) -> dict[str, int]:
    """:func:`count_parameters` of the config's backbone, without its weights."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.VFM.WEIGHTS = "random"
    with torch.device("meta"):
        return count_parameters(cfg, build_backbone(cfg))


def log_plan(cfg: CfgNode) -> dict[str, int]:
    """Logs and returns :func:`plan`."""
    counts = plan(cfg)
    logger.info(
        "%s on %s: %.2f M of %.2f M backbone weights will be tuned (%s of %s)",
        cfg.TUNING.METHOD,
        cfg.MODEL.VFM.NAME,
        counts["tuned_parameters"] / 1e6,
        counts["backbone_parameters"] / 1e6,
        f"{counts['tuned_parameters']:,}",
        f"{counts['backbone_parameters']:,}",
    )
    return counts
