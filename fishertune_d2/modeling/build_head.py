"""Builds the head of a config; an error names the key at fault and a value that works.

Detectron2's heads say it in the words of their code, if at all.
"""

import re
from collections.abc import Callable, Mapping

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_sem_seg_head
from torch import nn

from .detectron2_heads import DETECTRON2_HEADS
from .heads import WORKING_HEADS

_KEYS = "MODEL.SEM_SEG_HEAD"

# Patterns of errors, each with the remedy from the match and the keys of MODEL.SEM_SEG_HEAD.
_REMEDIES: Mapping[str, Callable[[re.Match, CfgNode], str]] = {
    r"num_channels \((\d+)\) must be divisible by num_groups \((\d+)\)": lambda found, keys: (
        f"GroupNorm divides channels into {found[2]} groups, and {found[1]} channels are no "
        f"multiple of it: choose multiples of {found[2]} for CONVS_DIM, "
        f"PROJECT_CHANNELS and ASPP_CHANNELS of {_KEYS}, or set {_KEYS}.NORM BN"
    ),
    r"Expected (\d+) project_channels, got (\d+)": lambda found, keys: (
        f"{_KEYS}.PROJECT_CHANNELS has the length {found[2]}, and IN_FEATURES "
        f"{list(keys.IN_FEATURES)} asks for {found[1]}, one for each map but the last: set "
        f"PROJECT_CHANNELS {[32] * int(found[1])}, or other IN_FEATURES, such as ['res2', 'res5']"
    ),
    r"ASPP expects 3 dilations, got (\d+)": lambda found, keys: (
        f"{_KEYS}.ASPP_DILATIONS has the length {found[1]}: set three numbers, such as [6, 12, 18]"
    ),
    r"Unexpected loss type: (\S+)": lambda found, keys: (
        f"{_KEYS}.LOSS_TYPE is {found[1]}: set cross_entropy or hard_pixel_mining"
    ),
    r"embed_dim \(d_model\) must be divisible by num_heads, but got (\d+) and (\d+)": (
        lambda found, keys: (
            f"MODEL.MASK_FORMER.HIDDEN_DIM {found[1]} is no multiple of MODEL.MASK_FORMER.NHEADS "
            f"{found[2]}: choose a HIDDEN_DIM that is one"
        )
    ),
    r"input_shape=\) cannot be empty": lambda found, keys: (
        f"{_KEYS}.IN_FEATURES is empty: name the backbone's maps, such as ['res2', 'res5']"
    ),
}


def build_head(cfg: CfgNode, shapes: dict[str, ShapeSpec]) -> nn.Module:
    """Returns the head that MODEL.SEM_SEG_HEAD describes, for a backbone's ``output_shape()``.

    Raises:
        ValueError: if the backbone lacks one of IN_FEATURES, or the head cannot be built; names
            the key and the remedy.
    """
    keys = cfg.MODEL.SEM_SEG_HEAD
    unknown = [name for name in keys.IN_FEATURES if name not in shapes]
    if unknown:  # some of Detectron2's heads ignore them
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.IN_FEATURES names {', '.join(unknown)}, which "
            f"{cfg.MODEL.BACKBONE.NAME} does not have: it has {', '.join(shapes)}"
        )
    if keys.NAME in DETECTRON2_HEADS and keys.COMMON_STRIDE < 1:
        smallest = min((shapes[name].stride for name in keys.IN_FEATURES), default=4)
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.COMMON_STRIDE is {keys.COMMON_STRIDE}: choose the smallest "
            f"stride of IN_FEATURES, {smallest} pixels"
        )
    try:
        return build_sem_seg_head(cfg, shapes)
    # Detectron2's heads name no key; those of its projects read keys that the config lacks.
    except (AssertionError, AttributeError, KeyError, ValueError) as error:
        raise ValueError(
            f"MODEL.SEM_SEG_HEAD.NAME {keys.NAME} cannot be built from the keys of the config: "
            f"{_why_not_built(keys, error)}"
        ) from error


def _why_not_built(keys: CfgNode, error: Exception) -> str:
    """Returns a sentence with the key and the remedy, or the error's own words."""
    said = str(error)
    for pattern, remedy in _REMEDIES.items():
        found = re.search(pattern, said)
        if found:
            return remedy(found, keys)
    if "No object named" in said:
        return f"no head of this name is registered. {WORKING_HEADS}"
    if isinstance(error, KeyError) and error.args == (keys.NORM,):
        return f"{_KEYS}.NORM is {keys.NORM!r}: choose GN, BN, SyncBN, LN or an empty string"
    if isinstance(error, (AttributeError, KeyError)):
        return f"it reads a key that the config does not have ({said}). {WORKING_HEADS}"
    if not said and len(keys.IN_FEATURES) > 1:  # DeepLabV3Head's assertion
        return (
            f"it takes one map, and {_KEYS}.IN_FEATURES is {list(keys.IN_FEATURES)}: set "
            "IN_FEATURES ['res5'] and COMMON_STRIDE 32"
        )
    return said or type(error).__name__
