"""AdaptFormer: a bottleneck beside the MLP of each block (Chen et al., NeurIPS 2022).

Shapes: N tokens, or places of a map, D channels, d of the bottleneck.
"""

from functools import partial

from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.modeling.vfm import VFMBackbone

from .registry import TUNING_REGISTRY, AddingMethod, linear


class Bottlenecks(nn.Module):
    """Adds s * Up(dropout(ReLU(Down(x)))) to the output of each block's MLP.

    x is the stream between attention and MLP, before the norm. The MLP's LayerScale and stochastic
    depth do not apply to the bottleneck.

    Args:
        backbone: a ``VFMBackbone``; its blocks get hooks.
        dim: d.
        scale: s.
        dropout: its probability (the authors': 0.1).

    Raises:
        ValueError: if ``dim`` is below 1.
    """

    def __init__(self, backbone: VFMBackbone, dim: int, scale: float, dropout: float = 0.1):
        super().__init__()
        if dim < 1:
            raise ValueError(f"TUNING.ADAPTFORMER.DIM is {dim}: choose above 0")
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        blocks, width = backbone.vit.blocks, backbone.vit.embed_dim
        like = backbone.vit.patch_embed.proj.weight
        down = [linear(width, dim, like) for _ in blocks]
        up = [linear(dim, width, like) for _ in blocks]
        self.down, self.up = nn.ModuleList(down), nn.ModuleList(up)
        self._stream: dict[int, Tensor] = {}
        for layer, block in enumerate(blocks):
            # As in LoRA, Up starts at 0, so that nothing is added at first.
            nn.init.kaiming_uniform_(down[layer].weight, a=5**0.5)
            for zero in (down[layer].bias, up[layer].weight, up[layer].bias):
                nn.init.zeros_(zero)
            block.norm2.register_forward_pre_hook(partial(self.keep, layer))
            block.drop_path2.register_forward_hook(partial(self.add, layer))
        self.train(backbone.training)

    def keep(self, layer: int, norm: nn.Module, args: tuple[Tensor]) -> None:
        """Keeps x, (..., N, D), until the block's MLP has run."""
        (self._stream[layer],) = args

    def add(self, layer: int, drop_path: nn.Module, args: tuple, y: Tensor) -> Tensor:
        """Adds the bottleneck's output to the MLP's output y, (..., N, D)."""
        hidden = self.dropout(self.down[layer](self._stream.pop(layer)).relu())
        return y + self.scale * self.up[layer](hidden)


class AdaptFormer(AddingMethod):
    """Trains a bottleneck in every block, in ``backbone.adaptformer``.

    Args:
        dim: width of the bottlenecks.
        scale: factor on their output.
    """

    options = ("ADAPTFORMER",)
    name = "adaptformer"
    no_merge = (
        "a bottleneck with a ReLU, beside an MLP that sees normalised tokens, cannot become a part "
        "of that MLP's weights"
    )

    def __init__(self, dim: int, scale: float):
        self.dim = dim
        self.scale = scale

    def build_module(self, backbone: VFMBackbone, head: nn.Module | None) -> Bottlenecks:
        """Builds the bottlenecks."""
        return Bottlenecks(backbone, self.dim, self.scale)


@TUNING_REGISTRY.register()
def adaptformer(cfg: CfgNode) -> AdaptFormer:
    """``TUNING.METHOD adaptformer``."""
    return AdaptFormer(cfg.TUNING.ADAPTFORMER.DIM, cfg.TUNING.ADAPTFORMER.SCALE)
