"""Visual query tuning (Tu et al., CVPR 2023), with our extension to dense prediction.

The published method gives each block its own query tokens. They attend, but nothing attends to
them, and the next block does not see them: attention takes its queries from them and from the
image's tokens, and its keys and values from the image's tokens alone. So the image's tokens do not
change, and a block's output for its queries is a summary of that layer. A linear classifier then
reads the summaries of all layers beside the final class token.

A dense decoder has no class token; the paper does not cover this case. The closest equivalent is a
linear layer on the concatenation of a place's features and a summary, which adds the same
projection of the summary to every place. Therefore each of the four maps of the pyramid becomes

    map + W mean(query outputs of the blocks after the previous tapped one, up to this one)

with one W for all maps, without bias, and 0 at first. If the decoder reads fewer maps, each gets
the blocks after the map before it. The mean over the tokens of a block is an option of the authors.
The mean over blocks, W and its place are ours. So is the number of queries: no number of queries
alone makes the paper's 3.01 M (122 make 3.00 M, 123 make 3.02 M); 80 queries and W make 3.01 M on a
ViT-L.

Shapes: B images, N tokens (prefix tokens, then patches), n queries, D channels.
"""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.modeling.vfm import BLOCKS, PYRAMID, VFMBackbone

from .registry import TUNING_REGISTRY
from .vpt import VPT, Prompts


class Queries(Prompts):
    """Prompts that attend but are not attended to; their outputs are added to the backbone's maps.

    Args:
        backbone: a ``VFMBackbone``; it and its blocks get hooks.
        num_tokens: n.
        dropout: dropout of the queries (the authors': 0.1).
    """

    def __init__(self, backbone: VFMBackbone, num_tokens: int, dropout: float = 0.1):
        super().__init__(backbone, num_tokens, dropout, "vqt")
        self.taps = backbone.taps
        weight = self.prompts[0].new_zeros(backbone.vit.embed_dim, backbone.vit.embed_dim)
        self.weight = nn.Parameter(weight)
        self._summaries: dict[int, Tensor] = {}
        backbone.register_forward_hook(self.add)

    def insert(
        self, layer: int, block: nn.Module, args: tuple, kwargs: Mapping
    ) -> tuple[tuple, Mapping]:
        """Puts a block's queries into its input, and masks them among attention's keys."""
        args, kwargs = super().insert(layer, block, args, kwargs)
        x = args[0]
        # A masked key is left out: softmax gives it exactly 0.
        attended = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        attended[..., self.start : self.start + self.num_tokens] = False
        return args, {**kwargs, "attn_mask": attended}

    def remove(self, layer: int, block: nn.Module, args: tuple, x: Tensor) -> Tensor:
        """Removes the queries from a block's output, and keeps their mean, (B, D)."""
        self._summaries[layer] = x[:, self.start : self.start + self.num_tokens].mean(dim=1)
        # No trained number reaches the image's tokens, but autograd does not know: without detach
        # it would go back through all blocks for gradients of 0.
        return super().remove(layer, block, args, x).detach()

    def add(
        self, backbone: nn.Module, args: tuple, maps: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Adds the summaries to the maps of blocks, (B, D, h, w) each, and to no others."""
        enriched, first = dict(maps), 0
        for *names, tap in zip(PYRAMID, BLOCKS, self.taps, strict=True):
            read = [name for name in names if name in maps]
            if not read:
                continue
            layers = [self._summaries[layer] for layer in range(first, tap + 1)]
            added = (torch.stack(layers).mean(dim=0) @ self.weight.T)[:, :, None, None]
            enriched |= {name: maps[name] + added for name in read}
            first = tap + 1
        self._summaries.clear()
        return enriched


class VQT(VPT):
    """Trains queries in every block and the layer that reads their outputs, in ``backbone.vqt``."""

    options = ("VQT",)
    name = "vqt"
    no_merge = "queries are tokens, and no weight of the backbone can replace a token"

    def build_module(self, backbone: VFMBackbone, head: nn.Module | None) -> Queries:
        """Builds the queries and the linear layer."""
        return Queries(backbone, self.num_tokens)


@TUNING_REGISTRY.register()
def vqt(cfg: CfgNode) -> VQT:
    """``TUNING.METHOD vqt``."""
    return VQT(cfg.TUNING.VQT.NUM_TOKENS)
