"""Resamples the maps of a plain ViT, which have one stride, to strides 4, 8, 16 and 32.

Shapes: B images, D channels, (h, w) patches of p x p pixels, (H, W) pixels, s stride in pixels.
"""

from collections.abc import Sequence
from math import ceil

import torch.nn.functional as F
from torch import Tensor

STRIDES = (4, 8, 16, 32)


def resize_to_stride(features: Tensor, patch_size: int, stride: int, size: Sequence[int]) -> Tensor:
    """Resamples a map bilinearly so that its cell (i, j) covers pixels [i*s, (i+1)*s).

    Args:
        features: (B, D, h, w); its cell (i, j) covers pixels [i*p, (i+1)*p).
        patch_size: p, in pixels.
        stride: s, in pixels.
        size: (H, W), the area to cover in pixels, at most (h*p, w*p).

    Returns:
        (B, D, ceil(H/s), ceil(W/s)). For p = 16 and H, W divisible by 32, Rein's pyramid.
    """
    target = [ceil(extent / stride) for extent in size]
    # interpolate() yields floor(h*p/s) cells, one too few if the border cuts the last one.
    # Repeating the border adds it, and bilinear resampling does the same outside a map.
    lack = [
        max(0, ceil(n * stride / patch_size) - cells)
        for n, cells in zip(target, features.shape[-2:], strict=True)
    ]
    if any(lack):
        features = F.pad(features, (0, lack[1], 0, lack[0]), mode="replicate")
    # A scale, because a target size would stretch the map if h*p/s is not whole.
    features = F.interpolate(
        features, scale_factor=patch_size / stride, mode="bilinear", align_corners=False
    )
    return features[..., : target[0], : target[1]]


def build_pyramid(
    maps: Sequence[Tensor], patch_size: int, size: Sequence[int]
) -> dict[str, Tensor]:
    """Resamples four maps to strides 4, 8, 16 and 32; the shallowest map gets the finest stride.

    Args:
        maps: four (B, D, h, w), from shallow to deep.
        patch_size: p, in pixels.
        size: (H, W) of the images, in pixels.

    Returns:
        "res2", "res3", "res4", "res5": (B, D, ceil(H/s), ceil(W/s)) at s = 4, 8, 16, 32.
    """
    return {
        f"res{i}": resize_to_stride(features, patch_size, stride, size)
        for i, (features, stride) in enumerate(zip(maps, STRIDES, strict=True), start=2)
    }
