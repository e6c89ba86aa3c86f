"""Queries, keys and values as three layers, where timm computes them with one.

Some methods treat the three differently, and peft chooses whole layers, by their names. While a
model is split, its fused layer ``blocks.<i>.attn.qkv`` has in its place the layers ``q_proj``,
``k_proj`` and ``v_proj`` below ``blocks.<i>.attn.qkv``, with rows of the same memory. Models that
have the three apart (EVA-02 L and B) have them below ``blocks.<i>.attn``, by the same names.
"""

import torch
from torch import Tensor, nn

PROJECTIONS = ("q_proj", "k_proj", "v_proj")


class SplitQKV(nn.Module):
    """What a fused layer computes, by three.

    Args:
        attn: timm's attention module. Where its biases stand beside the fused layer (EVA-02 S and
            Ti, without one for keys), they become the layers' own.
    """

    def __init__(self, attn: nn.Module):
        super().__init__()
        weights = attn.qkv.weight.chunk(3)
        self.biases_apart = getattr(attn, "q_bias", None) is not None
        biases = (None, None, None) if attn.qkv.bias is None else attn.qkv.bias.chunk(3)
        if self.biases_apart:
            biases = attn.q_bias, None, attn.v_bias
            attn.q_bias = attn.v_bias = None
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
        """Puts a fused layer, and its biases, back into ``attn``."""
        q, k, v = (self.get_submodule(name) for name in PROJECTIONS)
        weight = torch.cat([q.weight, k.weight, v.weight])
        fused = nn.Linear(weight.shape[1], weight.shape[0], k.bias is not None, device="meta")
        fused.weight = nn.Parameter(weight)
        if self.biases_apart:
            attn.q_bias, attn.v_bias = q.bias, v.bias
        elif k.bias is not None:
            fused.bias = nn.Parameter(torch.cat([q.bias, k.bias, v.bias]))
        attn.qkv = fused


def split_qkv(vit: nn.Module) -> None:
    """Splits every fused layer of a timm ViT; the state dict gets the names above."""
    for block in vit.blocks:
        if getattr(block.attn, "qkv", None) is not None:
            block.attn.qkv = SplitQKV(block.attn)


def join_qkv(vit: nn.Module) -> None:
    """Undoes :func:`split_qkv`, with the weights as they are now."""
    for block in vit.blocks:
        if isinstance(getattr(block.attn, "qkv", None), SplitQKV):
            block.attn.qkv.join(block.attn)
