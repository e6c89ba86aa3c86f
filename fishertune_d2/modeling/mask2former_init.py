"""Initialises transformers' bricks as the published Mask2Former does.

transformers initialises them only inside its own PreTrainedModel. Until then ``level_embed`` is raw
memory, and even there the convolutions get other distributions than in the published code.
"""

import math

import torch
from fvcore.nn.weight_init import c2_xavier_fill
from torch import nn
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerAttention,
    Mask2FormerPixelDecoder,
    Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention,
    Mask2FormerTransformerModule,
)


def init_pixel_decoder(decoder: Mask2FormerPixelDecoder) -> None:
    """Initialises a new pixel decoder, in place."""
    nn.init.normal_(decoder.level_embed)
    for projection in decoder.input_projections:
        convolution = next(projection.children())
        assert isinstance(convolution, nn.Conv2d) and convolution.bias is not None
        nn.init.xavier_uniform_(convolution.weight)
        nn.init.zeros_(convolution.bias)
    for block in [*decoder.lateral_convolutions, *decoder.output_convolutions]:
        c2_xavier_fill(next(block.children()))
    c2_xavier_fill(decoder.mask_projection)
    for layer in decoder.encoder.layers:
        _init_matrices(layer)
        attention = layer.self_attn
        assert isinstance(attention, Mask2FormerPixelDecoderEncoderMultiscaleDeformableAttention)
        nn.init.zeros_(attention.value_proj.bias)
        nn.init.zeros_(attention.output_proj.bias)
        nn.init.zeros_(attention.attention_weights.weight)
        nn.init.zeros_(attention.attention_weights.bias)
        # The sampling points start on square rings: head m looks in direction 2 pi m / heads, and
        # its point k is k + 1 cells away, for every query.
        nn.init.zeros_(attention.sampling_offsets.weight)
        angles = torch.arange(attention.n_heads) * (2 * math.pi / attention.n_heads)
        ring = torch.stack([angles.cos(), angles.sin()], dim=-1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # (heads, 2)
        steps = torch.arange(1, attention.n_points + 1)
        offsets = ring[:, None, None] * steps[:, None]  # (heads, 1, points, 2)
        offsets = offsets.expand(-1, attention.n_levels, -1, -1)
        with torch.no_grad():
            attention.sampling_offsets.bias.copy_(offsets.flatten())


def init_transformer(transformer: Mask2FormerTransformerModule) -> None:
    """Initialises a new masked-attention decoder, in place; queries keep their N(0, 1)."""
    for projection in transformer.input_projections:
        if isinstance(projection, nn.Conv2d):  # an empty Sequential where the widths agree
            c2_xavier_fill(projection)
    for layer in transformer.decoder.layers:
        _init_matrices(layer)
        attention = layer.self_attn
        assert isinstance(attention, Mask2FormerAttention)
        for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
            # The published code has one (3 D, D) matrix, with a narrower Xavier bound than (D, D).
            nn.init.xavier_uniform_(linear.weight, gain=math.sqrt(0.5))
            nn.init.zeros_(linear.bias)
        nn.init.zeros_(attention.out_proj.bias)


def _init_matrices(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
