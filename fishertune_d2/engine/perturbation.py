"""The simulated shift as a config sets it: in the estimate, and on the features of training."""

from typing import cast

from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.data.image_shifts import SHIFTS, mixed
from fishertune_d2.fisher import ImageShift, Perturbation, StatisticsPerturbation
from fishertune_d2.modeling.vfm import VFMBackbone

# The values of FISHER.PERTURB.KIND: Eq. 6, and shifts of the images.
FEATURES = "features"
_IMAGE_SHIFTS = {**SHIFTS, "mixed": mixed}
KINDS_OF_SHIFT = (FEATURES, *_IMAGE_SHIFTS)
# TUNING.FEATURE_PERTURBATION: the share of batches that are perturbed, as in DSU.
PERTURBED = 0.5


def build_perturbation(cfg: CfgNode, backbone: nn.Module, p: float = 1.0) -> StatisticsPerturbation:
    """Eq. 6 at FISHER.PERTURB.POINTS of the backbone, on a batch with probability ``p``."""
    vfm, perturb = cast(VFMBackbone, backbone), cfg.FISHER.PERTURB
    points = vfm.perturbation_points()
    return StatisticsPerturbation(
        [points[i] for i in perturb.POINTS],
        num_prefix_tokens=vfm.num_prefix_tokens,
        # Backbones of others, written for ViTs, may lack this attribute.
        channels_first=getattr(vfm, "channels_first", False),
        strength=perturb.STRENGTH,
        eps_mode=perturb.EPS_MODE,
        p=p,
    )


def build_shift(cfg: CfgNode, backbone: nn.Module) -> Perturbation:
    """What makes x' in the estimate, as FISHER.PERTURB.KIND says."""
    kind = cfg.FISHER.PERTURB.KIND
    if kind == FEATURES:
        return build_perturbation(cfg, backbone)
    return ImageShift(_IMAGE_SHIFTS[kind], kind, bgr=cfg.INPUT.FORMAT == "BGR")


def perturbation_of_training(
    cfg: CfgNode, backbone: nn.Module, processes: int
) -> StatisticsPerturbation | None:
    """Eq. 6 for the steps of training, or None; refuses a config with which it cannot work."""
    if not cfg.TUNING.FEATURE_PERTURBATION:
        return None
    images = cfg.SOLVER.IMS_PER_BATCH // processes // cfg.SOLVER.ACCUMULATE
    if images < 2:
        raise ValueError(
            "TUNING.FEATURE_PERTURBATION takes its statistics over what passes through the "
            f"model at once, but SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} over "
            f"{processes} processes, in {cfg.SOLVER.ACCUMULATE} parts (SOLVER.ACCUMULATE), is "
            f"{images} images: choose a batch of at least {2 * processes}, in fewer parts"
        )
    if cfg.MODEL.VFM.CHECKPOINT_BLOCKS:
        raise ValueError(
            "TUNING.FEATURE_PERTURBATION draws other numbers when a block is computed again: "
            "set MODEL.VFM.CHECKPOINT_BLOCKS to False"
        )
    return build_perturbation(cfg, backbone, p=PERTURBED)
