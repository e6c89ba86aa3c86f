"""timm's plain ViTs: their type, and how `VFMBackbone` reads them.

Shapes: B images, D channels, (h, w) patches of p x p pixels, (H, W) pixels.
"""

from collections.abc import Callable, Mapping, Sequence
from math import ceil
from typing import Any

import torch
from timm.layers import PatchEmbed
from torch import Tensor, nn

from fishertune_d2.fisher.perturb import thirds_of_depth

from .pyramid import STRIDES, build_pyramid


class PlainViT(nn.Module):
    """The parts that timm's ViTs have in common and this package uses, for annotations only."""

    patch_embed: PatchEmbed
    pos_embed: Tensor | None
    blocks: nn.ModuleList
    embed_dim: int
    num_features: int
    num_prefix_tokens: int
    pretrained_cfg: dict[str, Any]
    head: nn.Module
    forward_features: Callable[[Tensor], Tensor]
    forward_intermediates: Callable[..., Any]
    set_grad_checkpointing: Callable[[bool], None]


class PlainViTs:
    """Blocks of one width and one stride, whose maps are resampled to a pyramid; see `Family`."""

    channels_first = False

    def patch_size(self, asked: int, trained: int) -> int:
        """The size asked for, or that of the training."""
        return asked or trained

    def timm_args(self, img_size: Sequence[int], patch_size: int) -> Mapping[str, Any]:
        """The size of the padded input, so that an image of img_size needs no interpolation."""
        sides = tuple(ceil(side / patch_size) * patch_size for side in img_size)
        return {"img_size": sides, "patch_size": patch_size}

    def taps(self, model: PlainViT) -> list[int]:
        """The blocks at 1/3, 1/2, 2/3 and the end of the depth."""
        depth = len(model.blocks)
        return [*thirds_of_depth(depth), depth - 1]

    def channels(self, model: PlainViT) -> list[int]:
        """One width for all maps."""
        return [model.embed_dim] * len(STRIDES)

    def strides(self, patch_size: int) -> list[int]:
        """One patch, for all maps."""
        return [patch_size] * len(STRIDES)

    def blocks(self, model: PlainViT) -> list[nn.Module]:
        """All blocks."""
        return list(model.blocks)

    def perturbation_points(self, model: PlainViT) -> list[nn.Module]:
        """The patch embedding, and the blocks at 1/3, 1/2 and 2/3 of the depth."""
        return [model.patch_embed, *(model.blocks[i] for i in thirds_of_depth(len(model.blocks)))]

    def require_size(self, model: PlainViT, size: Sequence[int]) -> None:
        """Refuses other sizes, as the tracing ONNX exporter lacks timm's antialiased resize."""
        if not (torch.onnx.is_in_onnx_export() and torch.jit.is_tracing()):
            return
        size = tuple(int(side) for side in size)
        grid, patch = model.patch_embed.grid_size, model.patch_embed.patch_size
        assert grid is not None
        stored = tuple(cells * side for cells, side in zip(grid, patch, strict=True))
        if getattr(model, "pos_embed", None) is not None and size != stored:
            raise ValueError(
                "torch.onnx.export with dynamo=False cannot resize the position embedding, which "
                f"is stored for {list(stored)} pixels, to {list(size)}: export with dynamo=True, "
                f"or, on ViTs that have it, call vit.set_input_size(img_size={size}) before"
            )

    def pyramid(
        self, maps: Sequence[Tensor], patch_size: int, size: Sequence[int]
    ) -> dict[str, Tensor]:
        """Four maps (B, D, h, w), resampled by `build_pyramid`."""
        return build_pyramid(maps, patch_size, size)
