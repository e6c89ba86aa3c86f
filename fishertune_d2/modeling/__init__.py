"""Models: a vision foundation model, a Mask2Former head, and the segmentor of both."""

from .mask2former import Mask2FormerHead
from .mask_text_head import MaskTextHead
from .segmentor import VFMSegmentor
from .text_query_head import TextQueryHead
from .vfm import VFM, VFMS, VFMBackbone

__all__ = [
    "VFM",
    "VFMS",
    "Mask2FormerHead",
    "MaskTextHead",
    "TextQueryHead",
    "VFMBackbone",
    "VFMSegmentor",
]
