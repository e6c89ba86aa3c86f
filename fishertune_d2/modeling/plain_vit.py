"""The type of timm's plain ViTs."""

from collections.abc import Callable
from typing import Any

from timm.layers import PatchEmbed
from torch import Tensor, nn


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
