"""Keys that nothing reads, most of them Detectron2's, and the keys to use instead.

A config that was written for another Detectron2 project may set them; they change nothing.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode, get_cfg
from detectron2.projects.deeplab import add_deeplab_config
from detectron2.utils import comm

from .config import default_config, equal_values
from .config_slips import dotted_items

logger = logging.getLogger(__name__)

# Heads that read the keys of MODEL.MASK_FORMER.
_MASK_HEADS = ("Mask2FormerHead", "MaskTextHead", "TextQueryHead")


@dataclass(frozen=True)
class Unread:
    """Keys that nothing reads.

    Attributes:
        keys: patterns of their dotted paths, with a space between two.
        instead: the key to use in their place, or the reason why there is none.
        unless: tells whether a config has a part that reads them after all.
    """

    keys: str
    instead: str
    unless: Callable[[CfgNode], bool] = lambda cfg: False


def _other_model(cfg: CfgNode) -> bool:
    return cfg.MODEL.META_ARCHITECTURE != "VFMSegmentor"


def _other_backbone(cfg: CfgNode) -> bool:
    return _other_model(cfg) or cfg.MODEL.BACKBONE.NAME != "VFMBackbone"


def _other_head(cfg: CfgNode) -> bool:
    return _other_model(cfg) or cfg.MODEL.SEM_SEG_HEAD.NAME not in _MASK_HEADS


def _of_heads(*names: str) -> Callable[[CfgNode], bool]:
    return lambda cfg: _other_head(cfg) or cfg.MODEL.SEM_SEG_HEAD.NAME in names


def _clips_norms(cfg: CfgNode) -> bool:
    return cfg.SOLVER.CLIP_GRADIENTS.ENABLED and cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE != "value"


def _of_schedules(keys: str, *names: str) -> Unread:
    return Unread(
        keys,
        f"SOLVER.LR_SCHEDULER_NAME {names[0]} reads it",
        lambda cfg: cfg.SOLVER.LR_SCHEDULER_NAME in names,
    )


# tests/engine/test_unread_keys.py compares this table with the keys that a training reads.
UNREAD = (
    Unread(
        "INPUT.MIN_SIZE_TEST INPUT.MAX_SIZE_TEST",
        "TEST.SIZES says what size the images of a test set are fitted into",
    ),
    Unread("INPUT.MASK_FORMAT", "labels are images of classes"),
    Unread("TEST.AUG.*", "there is no test-time augmentation"),
    Unread("TEST.PRECISE_BN.*", "there is none; statistics of batch norms stay as trained"),
    Unread("TEST.DETECTIONS_PER_IMAGE TEST.KEYPOINT_OKS_SIGMAS", "pixels are scored, not objects"),
    Unread("VIS_PERIOD", "TEST.PICTURES says how many pictures an evaluation draws"),
    Unread("GLOBAL.HACK", "it has no meaning"),
    Unread(
        "DATALOADER.ASPECT_RATIO_GROUPING", "with INPUT.CROP all images of a batch have one size"
    ),
    Unread(
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
        "all images train; python -m fishertune_d2.data.check finds those without a class",
    ),
    Unread("DATALOADER.REPEAT_SQRT", "images are repeated by the square root, its default"),
    Unread(
        "DATALOADER.REPEAT_THRESHOLD",
        "DATALOADER.SAMPLER_TRAIN RepeatFactorTrainingSampler reads it",
        lambda cfg: cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler",
    ),
    Unread(
        "DATALOADER.RARE_CLASS_*",
        "DATALOADER.SAMPLER_TRAIN RareClassSampler reads it",
        lambda cfg: cfg.DATALOADER.SAMPLER_TRAIN == "RareClassSampler",
    ),
    Unread(
        "FISHER.PERTURB.POINTS FISHER.PERTURB.STRENGTH FISHER.PERTURB.EPS_MODE",
        'Eq. 6 reads it, with FISHER.PERTURB.KIND "features"',
        lambda cfg: cfg.FISHER.PERTURB.KIND == "features" or cfg.TUNING.FEATURE_PERTURBATION,
    ),
    Unread("DATASETS.PROPOSAL_FILES_* DATASETS.PRECOMPUTED_*", "nothing here has proposals"),
    _of_schedules("SOLVER.STEPS SOLVER.RESCALE_INTERVAL", "WarmupMultiStepLR"),
    _of_schedules("SOLVER.GAMMA", "WarmupMultiStepLR", "WarmupStepWithFixedGammaLR"),
    _of_schedules("SOLVER.NUM_DECAYS", "WarmupStepWithFixedGammaLR"),
    _of_schedules("SOLVER.BASE_LR_END", "WarmupCosineLR"),
    _of_schedules("SOLVER.POLY_LR_POWER SOLVER.POLY_LR_CONSTANT_ENDING", "WarmupPolyLR"),
    Unread(
        "SOLVER.MOMENTUM SOLVER.NESTEROV",
        "SOLVER.OPTIMIZER SGD reads it",
        lambda cfg: cfg.SOLVER.OPTIMIZER == "SGD",
    ),
    Unread(
        "SOLVER.CLIP_GRADIENTS.CLIP_*",
        "gradients are clipped with SOLVER.CLIP_GRADIENTS.ENABLED True",
        lambda cfg: cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
    ),
    Unread(
        "SOLVER.CLIP_GRADIENTS.NORM_TYPE",
        "norms are clipped with SOLVER.CLIP_GRADIENTS.ENABLED True and CLIP_TYPE norm",
        _clips_norms,
    ),
    Unread(
        "MODEL.LOAD_PROPOSALS MODEL.MASK_ON MODEL.KEYPOINT_ON MODEL.PANOPTIC_FPN.* "
        "MODEL.PROPOSAL_GENERATOR.* MODEL.ANCHOR_GENERATOR.* MODEL.RPN.* MODEL.ROI_* "
        "MODEL.RETINANET.*",
        "VFMSegmentor finds no objects",
        _other_model,
    ),
    Unread(
        "MODEL.BACKBONE.FREEZE_AT",
        "TUNING.METHOD says which of its weights train",
        _other_backbone,
    ),
    Unread(
        "MODEL.RESNETS.* MODEL.FPN.*",
        "VFMBackbone is neither; MODEL.VFM says which it is",
        _other_backbone,
    ),
    Unread(
        "MODEL.SEM_SEG_HEAD.COMMON_STRIDE MODEL.SEM_SEG_HEAD.LOSS_TYPE "
        "MODEL.SEM_SEG_HEAD.PROJECT_* MODEL.SEM_SEG_HEAD.ASPP_* "
        "MODEL.SEM_SEG_HEAD.USE_DEPTHWISE_SEPARABLE_CONV",
        "Mask2Former's heads have no such part; MODEL.MASK_FORMER has its keys",
        _other_head,
    ),
    Unread(
        "MODEL.TEXT.NAME MODEL.TEXT.WEIGHTS MODEL.TEXT.CLASSES",
        "the heads MaskTextHead and TextQueryHead read it",
        _of_heads("MaskTextHead", "TextQueryHead"),
    ),
    Unread(
        "MODEL.TEXT.CONTEXT_TOKENS MODEL.TEXT.*_WEIGHT",
        "the head TextQueryHead reads it",
        _of_heads("TextQueryHead"),
    ),
    Unread(
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES",
        "TextQueryHead has one query for each class",
        lambda cfg: cfg.MODEL.SEM_SEG_HEAD.NAME != "TextQueryHead",
    ),
    Unread(
        "SELF_TRAINING.RATIO SELF_TRAINING.EMA SELF_TRAINING.PERIOD SELF_TRAINING.SAM",
        "SELF_TRAINING.IMAGES names no folder",
        lambda cfg: bool(cfg.SELF_TRAINING.IMAGES),
    ),
    Unread(
        "MODEL.SEM_SEG_HEAD.NORM",
        "the head has no such part; MODEL.MASK_FORMER has its keys",
        _of_heads("TextQueryHead"),
    ),
)


def stock_keys() -> dict[str, Any]:
    """The keys of Detectron2 and its DeepLab project by their dotted paths, with their values."""
    cfg = get_cfg()
    add_deeplab_config(cfg)
    return dict(dotted_items(cfg))


def why_unread(key: str, cfg: CfgNode) -> str | None:
    """The remedy for a key that nothing reads with this config; None if something reads it."""
    for unread in UNREAD:
        if any(fnmatchcase(key, pattern) for pattern in unread.keys.split()):
            return None if unread.unless(cfg) else unread.instead
    return None


def unread_keys(cfg: CfgNode) -> dict[str, str]:
    """The keys that a config changes and nothing reads, with the remedy for each."""
    start, now = (dict(dotted_items(each)) for each in (default_config(), cfg))
    changed = [key for key in start if key in now and not equal_values(now[key], start[key])]
    return {key: why for key in changed if (why := why_unread(key, cfg)) is not None}


def warn_of_unread_keys(cfg: CfgNode) -> None:
    """Names the keys of a config that change nothing, in one warning of the main process."""
    found = unread_keys(cfg)
    if not found or not comm.is_main_process():
        return
    by_remedy: dict[str, list[str]] = {}
    for key, why in found.items():
        by_remedy.setdefault(why, []).append(key)
    lines = [f"  {', '.join(keys)}: {why}" for why, keys in by_remedy.items()]
    logger.warning("The config sets keys that nothing here reads:\n%s", "\n".join(lines))
