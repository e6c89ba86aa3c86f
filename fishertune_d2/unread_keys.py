"""Keys of Detectron2 that nothing here reads, so that a config which sets them says too much.

A config written for another project of Detectron2 may hold them; they change nothing.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.utils import comm

from .config import default_config, equal_values

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Unread:
    """Keys that are not read.

    Attributes:
        keys: patterns of their dotted paths.
        instead: what to use in their place, or why there is none.
        unless: whether a config has something that reads them after all.
    """

    keys: tuple[str, ...]
    instead: str
    unless: Callable[[CfgNode], bool] = lambda cfg: False


def _other_model(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE != "VFMSegmentor"


def _other_backbone(cfg: CfgNode) -> bool:
    return _other_model(cfg) or cfg.MODEL.BACKBONE.NAME != "VFMBackbone"


def _other_head(cfg: CfgNode) -> bool:
    return _other_model(cfg) or cfg.MODEL.SEM_SEG_HEAD.NAME != "Mask2FormerHead"


def _clips_norms(cfg: CfgNode) -> bool:
    return cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != "value"


def _schedule(*names: str) -> Callable[[CfgNode], bool]:
    return lambda cfg: cfg.SOLVER.LR_SCHEDULER_NAME in names


_POLY, _STEPS, _COSINE = "WarmupPolyLR", "WarmupMultiStepLR", "WarmupCosineLR"
_GAMMA = "WarmupStepWithFixedGammaLR"
_OTHER_SCHEDULE = "SOLVER.LR_SCHEDULER_NAME {} reads it"

# tests/engine/test_unread_keys.py records what a training reads, and compares it with these rows.
UNREAD = (
    Unread(
        ("INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST"),
        "TEST.SIZES says what size the images of a test set are fitted into",
    ),
    Unread(("INPUT.MASK_FORMAT",), "labels are images of classes"),
    Unread(("TEST.AUG.*",), "there is no test-time augmentation"),
    Unread(("TEST.PRECISE_BN.*",), "there is none; statistics of batch norms stay as trained"),
    Unread(
        ("TEST.DETECTIONS_PER_IMAGE", "TEST.KEYPOINT_OKS_SIGMAS"), "pixels are scored, not objects"
    ),
    Unread(("VIS_PERIOD",), "TEST.PICTURES says how many pictures an evaluation draws"),
    Unread(("GLOBAL.HACK",), "it has no meaning"),
    Unread(
        ("DATALOADER.ASPECT_RATIO_GROUPING",), "with INPUT.CROP all images of a batch have one size"
    ),
    Unread(
        ("DATALOADER.FILTER_EMPTY_ANNOTATIONS",),
        "all images train; python -m fishertune_d2.data.check finds those without a class",
    ),
    Unread(("DATALOADER.REPEAT_SQRT",), "images are repeated by the square root, its default"),
    Unread(
        ("DATALOADER.REPEAT_THRESHOLD",),
        "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler reads it",
        lambda cfg: cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler",
    ),
    Unread(("DATASETS.PROPOSAL_FILES_*", "DATASETS.PRECOMPUTED_*"), "nothing here has proposals"),
    Unread(
        ("SOLVER.STEPS", "SOLVER.RESCALE_INTERVAL"),
        _OTHER_SCHEDULE.format(_STEPS),
        _schedule(_STEPS),
    ),
    Unread(("SOLVER.GAMMA",), _OTHER_SCHEDULE.format(_STEPS), _schedule(_STEPS, _GAMMA)),
    Unread(("SOLVER.NUM_DECAYS",), _OTHER_SCHEDULE.format(_GAMMA), _schedule(_GAMMA)),
    Unread(("SOLVER.BASE_LR_END",), _OTHER_SCHEDULE.format(_COSINE), _schedule(_COSINE)),
    Unread(
        ("SOLVER.POLY_LR_POWER", "SOLVER.POLY_LR_CONSTANT_ENDING"),
        _OTHER_SCHEDULE.format(_POLY),
        _schedule(_POLY),
    ),
    Unread(
        ("SOLVER.MOMENTUM", "SOLVER.NESTEROV"),
        "SOLVER.OPTIMIZER SGD reads it",
        lambda cfg: cfg.SOLVER.OPTIMIZER == "SGD",
    ),
    Unread(
        ("SOLVER.CLIP_GRADIENTS.CLIP_*",),
        "gradients are clipped with SOLVER.CLIP_GRADIENTS.ENABLED True",
        lambda cfg: cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
    ),
    Unread(
        ("SOLVER.CLIP_GRADIENTS.NORM_TYPE",),
        "norms are clipped with SOLVER.CLIP_GRADIENTS.ENABLED True and CLIP_TYPE norm",
        _clips_norms,
    ),
    Unread(
        (
            *("MODEL.LOAD_PROPOSALS", "MODEL.MASK_ON", "MODEL.KEYPOINT_ON", "MODEL.PANOPTIC_FPN.*"),
            *("MODEL.PROPOSAL_GENERATOR.*", "MODEL.ANCHOR_GENERATOR.*", "MODEL.RPN.*"),
            *("MODEL.ROI_*", "MODEL.RETINANET.*"),
        ),
        "VFMSegmentor finds no objects",
        _other_model,
    ),
    Unread(("MODEL.BACKBONE.FREEZE_AT",), "TUNING.METHOD says what of it trains", _other_backbone),
    Unread(
        ("MODEL.RESNETS.*", "MODEL.FPN.*"),
        "VFMBackbone is neither; MODEL.VFM says which it is",
        _other_backbone,
    ),
    Unread(
        (
            *("MODEL.SEM_SEG_HEAD.COMMON_STRIDE", "MODEL.SEM_SEG_HEAD.NORM"),
            *("MODEL.SEM_SEG_HEAD.LOSS_TYPE", "MODEL.SEM_SEG_HEAD.PROJECT_*"),
            *("MODEL.SEM_SEG_HEAD.ASPP_*", "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV"),
        ),
        "Mask2FormerHead has no such part; MODEL.MASK_FORMER has its keys",
        _other_head,
    ),
)


def stock_keys() -> dict[str, Any]:
    """The keys of Detectron2 and its DeepLab project by their dotted paths, with their values."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    return dict(_leaves(cfg))


def why_unread(key: str, cfg: CfgNode) -> str | None:
    """What to use in place of a key that ``cfg`` has nothing to read with; None if it is read."""
    for row in UNREAD:
        if any(fnmatchcase(key, pattern) for pattern in row.keys):
            return None if row.unless(cfg) else row.instead
    return None


def unread_keys(cfg: CfgNode) -> dict[str, str]:
    """The keys that a config changes and nothing reads, and what to use instead.

    Args:
        cfg: compared with Detectron2's defaults and the recipe.
    """
    start, now = (dict(_leaves(each)) for each in (default_config(), cfg))
    changed = [key for key in stock_keys() if key in now and not equal_values(now[key], start[key])]
    return {key: why for key in changed if (why := why_unread(key, cfg)) is not None}


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """Says in one warning, of the main process, which keys of a config change nothing."""
    found = unread_keys(cfg)
    if not found or not comm.is_main_process():
        return
    by_remedy: dict[str, list[str]] = {}
    for key, why in found.items():
        by_remedy.setdefault(why, []).append(key)
    lines = [f"  {', '.join(keys)}: {why}" for why, keys in by_remedy.items()]
    logger.warning("The config sets keys that nothing here reads:\n%s", "\n".join(lines))


def _leaves(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        if isinstance(value, CfgNode):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
