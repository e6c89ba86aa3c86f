"""Visual prompt tuning, deep: tokens of its own for each block (Jia et al., ECCV 2022).

Shapes: B images, N tokens (prefix tokens, then patches), n prompts, D channels.
"""

from collections.abc import Mapping
from functools import partial

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from .registry import TUNING_REGISTRY, TuningMethod


class Prompts(nn.Module):
    """Tokens that one block sees behind the prefix tokens, and that are gone after it.

    What a block made of its prompts is dropped, for the next block has its own. So the blocks'
    outputs keep their places, and whatever reads them, such as the maps, never meets a prompt.

    Args:
        backbone: a ``VFMBackbone``; its blocks get hooks.
        num_tokens: n.
        dropout: of the prompts' numbers.
        method: what an error calls this.

    Attributes:
        prompts: for each block (n, D).

    Raises:
        ValueError: if ``num_tokens`` is below 1, or the blocks see windows, not one sequence.
    """

    def __init__(self, backbone: nn.Module, num_tokens: int, dropout: float, method: str):
        super().__init__()
        if num_tokens < 1:
            raise ValueError(f"TUNING.{method.upper()}.NUM_TOKENS is {num_tokens}: choose above 0")
        vit = backbone.vit
        if any(hasattr(block, "window_size") for block in vit.blocks):
            raise ValueError(
                f"TUNING.METHOD {method} adds tokens to a sequence, but the blocks of "
                f"{type(vit).__name__} see windows of a map, with position terms for each of their "
                "places: choose another method or another MODEL.VFM.NAME"
            )
        self.num_tokens = num_tokens
        self.start = backbone.num_prefix_tokens
        self.dropout = nn.Dropout(dropout)
        # The authors': that of a linear layer from the pixels of a patch to its token.
        bound = (6 / (3 * backbone.patch_size**2 + vit.embed_dim)) ** 0.5
        like = vit.patch_embed.proj.weight
        self.prompts = nn.ParameterList(
            like.new_empty(num_tokens, vit.embed_dim).uniform_(-bound, bound) for _ in vit.blocks
        )
        for layer, block in enumerate(vit.blocks):
            block.register_forward_pre_hook(partial(self.insert, layer), with_kwargs=True)
            block.register_forward_hook(partial(self.remove, layer))
            # Rotary positions belong to patches; timm's attention skips so many tokens at the
            # front. Attention without them has no such count.
            if hasattr(block.attn, "num_prefix_tokens"):
                block.attn.num_prefix_tokens += num_tokens
        self.train(backbone.training)

    def insert(
        self, layer: int, block: nn.Module, args: tuple, kwargs: Mapping
    ) -> tuple[tuple, Mapping]:
        """Puts a block's prompts into its input, (B, N, D) -> (B, N + n, D)."""
        x, *others = args
        prompts = self.dropout(self.prompts[layer].expand(x.shape[0], -1, -1))
        x = torch.cat([x[:, : self.start], prompts, x[:, self.start :]], dim=1)
        return (x, *others), kwargs

    def remove(self, layer: int, block: nn.Module, args: tuple, x: Tensor) -> Tensor:
        """Takes the prompts out of a block's output, (B, N + n, D) -> (B, N, D)."""
        return torch.cat([x[:, : self.start], x[:, self.start + self.num_tokens :]], dim=1)


class VPT(TuningMethod):
    """Trains prompts in every block; the backbone itself stays as it is.

    Args:
        num_tokens: prompts in each block.
    """

    options = ("VPT",)
    adds = True

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds the prompts, as ``backbone.vpt``."""
        backbone.vpt = Prompts(backbone, self.num_tokens, dropout=0.0, method="vpt")

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """The prompts."""
        return {f"vpt.{name}": p for name, p in backbone.vpt.named_parameters()}

    def merge(self, backbone: nn.Module) -> None:
        """Cannot be done.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "TUNING.METHOD vpt cannot be merged: prompts are tokens, which no weight of the "
            "backbone can stand for. Export the run's checkpoint"
        )


@TUNING_REGISTRY.register()
def vpt(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD vpt``."""
    return VPT(cfg.TUNING.VPT.NUM_TOKENS)
