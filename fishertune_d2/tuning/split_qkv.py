"""Splits timm's fused layers of queries, keys and values into three layers, and joins them again.

Some methods treat the three differently, and peft chooses whole layers by their names. In a split
model the layers ``q_proj``, ``k_proj`` and ``v_proj`` below ``blocks.<i>.attn.qkv`` replace the
fused layer. Their weights are rows of the same memory. Models with three separate layers (EVA-02 L
and B) have them below ``blocks.<i>.attn``, with the same names.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitQKV(nn.Module):
    """Computes the output of a fused layer with three layers.

    Args:
        attn: timm's attention module. Separate biases beside the fused layer (EVA-02 S and Ti,
            without one for keys) move into the layers.
    """

    def __init__(self, attn: nn.Module):
        super().__init__()
        fused = attn.get_submodule("qkv")
        weights = fused.get_parameter("weight").chunk(3)
        self.biases_apart = getattr(attn, "q_bias", None) is not None
        biases: Sequence[Tensor | None] = (None, None, None)
        if self.biases_apart:
            biases = attn.get_parameter("q_bias"), None, attn.get_parameter("v_bias")
            for name in ("q_bias", "v_bias"):
                setattr(attn, name, None)
        elif fused.bias is not None:
            biases = fused.get_parameter("bias").chunk(3)
        for name, weight, bias in zip(PROJECTIONS, weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, N, in) to (B, N, 3 * out)."""
        return torch.cat([self.get_submodule(name)(x) for name in PROJECTIONS], dim=-1)

    @torch.no_grad()
    def join(self, attn: nn.Module) -> None:
        """Replaces this layer in ``attn`` by a fused one with its biases."""
        q, k, v = (cast(nn.Linear, self.get_submodule(name)) for name in PROJECTIONS)
        weight = torch.cat([q.weight, k.weight, v.weight])
        fused = nn.Linear(weight.shape[1], weight.shape[0], k.bias is not None, device="meta")
        fused.weight = nn.Parameter(weight)
        if self.biases_apart:
            attn.q_bias, attn.v_bias = q.bias, v.bias
        elif k.bias is not None:
            fused.bias = nn.Parameter(torch.cat([q.bias, k.bias, v.bias]))
        attn.qkv = fused


def split_qkv(vit: nn.Module, first: int = 0) -> None:
    """Splits the fused layers of a timm ViT; the state dict gets the names above.

    Args:
        vit: the model. One without such blocks, as a ConvNeXt, stays as it is.
        first: the first block whose layer is split.
    """
    for block in _blocks(vit)[first:]:
        attn = block.get_submodule("attn")
        if getattr(attn, "qkv", None) is not None:
            attn.qkv = SplitQKV(attn)


def join_qkv(vit: nn.Module) -> None:
    """Undoes :func:`split_qkv`; the weights keep their current values."""
    for block in _blocks(vit):
        attn = block.get_submodule("attn")
        layer = getattr(attn, "qkv", None)
        if isinstance(layer, SplitQKV):
            layer.join(attn)


def _blocks(vit: nn.Module) -> list[nn.Module]:
    """The blocks with attention."""
    return list(vit.get_submodule("blocks").children()) if hasattr(vit, "blocks") else []
