"""Visual prompt tuning, deep: each block has its own prompts (Jia et al., ECCV 2022).

Shapes: B images, N tokens (prefix tokens, then patches), n prompts, D channels.
"""

from collections.abc import Mapping
from functools import partial

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.modeling.vfm import VFMBackbone

from .registry import TUNING_REGISTRY, AddingMethod, uniform


class Prompts(nn.Module):
    """Tokens that one block sees behind the prefix tokens, and that are removed after it.

    A block's output for its prompts is dropped, because the next block has its own prompts. So the
    outputs of the blocks keep their shape, and their readers, such as the pyramid, see no prompt.

    Args:
        backbone: a ``VFMBackbone``; its blocks get hooks.
        num_tokens: n.
        dropout: dropout of the prompts.
        method: the name of the method in error messages.

    Attributes:
        prompts: one parameter of shape (n, D) for each block.

    Raises:
        ValueError: if ``num_tokens`` is below 1, or the blocks see windows, not one sequence.
    """

    def __init__(self, backbone: VFMBackbone, num_tokens: int, dropout: float, method: str):
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
        # The authors' range: that of a linear layer from the pixels of a patch to its token.
        bound = (6 / (3 * backbone.patch_size**2 + vit.embed_dim)) ** 0.5
        shape, like = (num_tokens, vit.embed_dim), vit.patch_embed.proj.weight
        self.prompts = nn.ParameterList(uniform(shape, bound, like) for _ in vit.blocks)
        for layer, block in enumerate(vit.blocks):
            block.register_forward_pre_hook(partial(self.insert, layer), with_kwargs=True)
            block.register_forward_hook(partial(self.remove, layer))
            # Only patches have rotary positions: timm's attention skips this number of tokens at
            # the front. Attention without rotary positions has no such count.
            skipped = getattr(block.attn, "num_prefix_tokens", None)
            if skipped is not None:
                block.attn.num_prefix_tokens = skipped + num_tokens
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
        """Removes the prompts from a block's output, (B, N + n, D) -> (B, N, D)."""
        return torch.cat([x[:, : self.start], x[:, self.start + self.num_tokens :]], dim=1)


class VPT(AddingMethod):
    """Trains prompts in every block, in ``backbone.vpt``.

    Args:
        num_tokens: prompts in each block.
    """

    options = ("VPT",)
    name = "vpt"
    undecayed = ("prompts",)
    no_merge = "prompts are tokens, and no weight of the backbone can replace a token"

    def __init__(self, num_tokens: int):
        self.num_tokens = num_tokens

    def build_module(self, backbone: VFMBackbone, head: nn.Module | None) -> Prompts:
        """Builds the prompts."""
        return Prompts(backbone, self.num_tokens, dropout=0.0, method=self.name)


@TUNING_REGISTRY.register()
def vpt(cfg: CfgNode) -> VPT:
    """``TUNING.METHOD vpt``."""
    return VPT(cfg.TUNING.VPT.NUM_TOKENS)
