"""Visual query tuning (Tu et al., CVPR 2023), and a use of it in dense prediction, which is ours.

The published method gives each block query tokens of its own. They are asked with, but neither
attended to nor passed on: attention takes its queries from them and from the image's tokens, its
keys and values from the image's tokens alone. So the image's tokens stay what they are without,
and what a block makes of its queries is a summary of that layer. A linear classifier then reads
the summaries of all layers beside the final class token.

A decoder of places has no class token, and the authors define no use there. What comes closest: a
linear layer on the concatenation of a place's features and a summary. It adds a projection of the
summary to every place alike. So here, to each of the four maps that form the pyramid,

    map + W mean(what the blocks from the tapped one before up to this one made of their queries)

with one W for all maps, without bias, and 0 at first. The mean over the tokens of a block is an
option of the authors; the mean over blocks, W, and where it enters are ours. So is the number of
queries: the paper's 3.01 M fit no number of queries alone (122 make 3.00 M, 123 make 3.02 M); 80
queries and W make 3.01 M on a ViT-L.

Shapes: B images, N tokens (prefix tokens, then patches), n queries, D channels.
"""

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .registry import TUNING_REGISTRY, TuningMethod
from .vpt import Prompts


class Queries(Prompts):
    """Prompts that only ask; what they gather is added to the backbone's maps.

    Args:
        backbone: a ``VFMBackbone``; it and its blocks get hooks.
        num_tokens: n.
        dropout: of the queries' numbers (the authors': 0.1).

    Raises:
        ValueError: if ``num_tokens`` is below 1, or the blocks see windows, not one sequence.
    """

    def __init__(self, backbone: nn.Module, num_tokens: int, dropout: float = 0.1):
        super().__init__(backbone, num_tokens, dropout, "vqt")
        self.taps = backbone.taps
        weight = self.prompts[0].new_zeros(backbone.vit.embed_dim, backbone.vit.embed_dim)
        self.weight = nn.Parameter(weight)
        self._summaries: dict[int, Tensor] = {}
        backbone.register_forward_hook(self.add)

    def insert(
        self, layer: int, block: nn.Module, args: tuple, kwargs: Mapping
    ) -> tuple[tuple, Mapping]:
        """Puts a block's queries into its input, and hides them from attention's keys."""
        args, kwargs = super().insert(layer, block, args, kwargs)
        x = args[0]
        # Masking a key is leaving it out, for softmax gives it exactly 0.
        attended = torch.ones(1, 1, 1, x.shape[1], dtype=torch.bool, device=x.device)
        attended[..., self.start : self.start + self.num_tokens] = False
        return args, {**kwargs, "attn_mask": attended}

    def remove(self, layer: int, block: nn.Module, args: tuple, x: Tensor) -> Tensor:
        """Takes the queries out of a block's output, and keeps their mean, (B, D)."""
        self._summaries[layer] = x[:, self.start : self.start + self.num_tokens].mean(dim=1)
        # No trained number has reached the image's tokens, which autograd cannot know: without
        # this it would go back through all blocks for gradients of 0.
        return super().remove(layer, block, args, x).detach()

    def add(
        self, backbone: nn.Module, args: tuple, maps: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The pyramid, (B, D, h, w) each, with the summaries added."""
        enriched, first = {}, 0
        for (name, features), tap in zip(maps.items(), self.taps, strict=True):
            layers = range(first, tap + 1)
            summary = torch.stack([self._summaries.pop(layer) for layer in layers]).mean(dim=0)
            enriched[name] = features + (summary @ self.weight.T)[:, :, None, None]
            first = tap + 1
        return enriched


class VQT(TuningMethod):
    """Trains queries in every block, and the layer that reads what they gather.

    Args:
        num_tokens: queries in each block.
    """

    options = ("VQT",)
    adds = True

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds queries and the linear layer, as ``backbone.vqt``."""
        backbone.vqt = Queries(backbone, self.num_tokens)

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The queries and the linear layer's weight."""
        return {f"vqt.{name}": p for name, p in backbone.vqt.named_parameters()}

    def merge(self, backbone: nn.Module) -> None:
        """Cannot be done.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "TUNING.METHOD vqt cannot be merged: queries are tokens, which no weight of the "
            "backbone can stand for. Export the run's checkpoint"
        )


@TUNING_REGISTRY.register()
def vqt(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD vqt``."""
    return VQT(cfg.TUNING.VQT.NUM_TOKENS)
