"""AdaptFormer: a bottleneck beside the MLP of each block (Chen et al., NeurIPS 2022).

Shapes: N tokens, or places of a map, D channels, d of the bottleneck.
"""

from functools import partial

from detectron2.config import CfgNode
from torch import Tensor, nn

from .registry import TUNING_REGISTRY, TuningMethod


class Bottlenecks(nn.Module):
    """Adds s * Up(dropout(ReLU(Down(x)))) to what each block's MLP adds to x.

    x is the stream between attention and MLP, before the norm. The MLP's LayerScale and stochastic
    depth do not touch what is added here.

    Args:
        backbone: a ``VFMBackbone``; its blocks get hooks.
        dim: d.
        scale: s.
        dropout: its probability (the authors': 0.1).

    Raises:
        ValueError: if ``dim`` is below 1.
    """

    def __init__(self, backbone: nn.Module, dim: int, scale: float, dropout: float = 0.1):
        super().__init__()
        if dim < 1:
            raise ValueError(f"TUNING.ADAPTFORMER.DIM is {dim}: choose above 0")
        self.scale = scale
        self.dropout = nn.Dropout(dropout)
        blocks, channels = backbone.vit.blocks, backbone.vit.embed_dim
        like = backbone.vit.patch_embed.proj.weight
        options = {"device": like.device, "dtype": like.dtype}
        self.down = nn.ModuleList(nn.Linear(channels, dim, **options) for _ in blocks)
        self.up = nn.ModuleList(nn.Linear(dim, channels, **options) for _ in blocks)
        self._stream: dict[int, Tensor] = {}
        for layer, block in enumerate(blocks):
            # As LoRA starts: Up is 0, so that at first nothing is added.
            nn.init.kaiming_uniform_(self.down[layer].weight, a=5**0.5)
            for zero in (self.down[layer].bias, self.up[layer].weight, self.up[layer].bias):
                nn.init.zeros_(zero)
            block.norm2.register_forward_pre_hook(partial(self.keep, layer))
            block.drop_path2.register_forward_hook(partial(self.add, layer))
        self.train(backbone.training)

    def keep(self, layer: int, norm: nn.Module, args: tuple[Tensor]) -> None:
        """Remembers x, (..., N, D), until the block's MLP is through."""
        (self._stream[layer],) = args

    def add(self, layer: int, drop_path: nn.Module, args: tuple, y: Tensor) -> Tensor:
        """What the block adds to x, (..., N, D): the MLP's y and the bottleneck's."""
        hidden = self.dropout(self.down[layer](self._stream.pop(layer)).relu())
        return y + self.scale * self.up[layer](hidden)


class AdaptFormer(TuningMethod):
    """Trains a bottleneck in every block; the backbone itself stays as it is.

    Args:
        dim: width of the bottlenecks.
        scale: factor on what they add.
    """

    options = ("ADAPTFORMER",)
    adds = True

    def __init__(self, dim: int, scale: float):
        self.dim = dim
        self.scale = scale

    def attach(self, backbone: nn.Module, head: nn.Module | None = None) -> None:
        """Adds the bottlenecks, as ``backbone.adaptformer``."""
        backbone.adaptformer = Bottlenecks(backbone, self.dim, self.scale)

    def parameters(self, backbone: nn.Module) -> dict[str, nn.Parameter]:
        """Weights and biases of the bottlenecks."""
        return {f"adaptformer.{name}": p for name, p in backbone.adaptformer.named_parameters()}

    def merge(self, backbone: nn.Module) -> None:
        """Cannot be done.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "TUNING.METHOD adaptformer cannot be merged: a bottleneck with a ReLU, beside an MLP "
            "that sees normalised tokens, is no part of that MLP's weights. Export the run's "
            "checkpoint"
        )


@TUNING_REGISTRY.register()
def adaptformer(cfg: CfgNode) -> TuningMethod:
    """``TUNING.METHOD adaptformer``."""
    return AdaptFormer(cfg.TUNING.ADAPTFORMER.DIM, cfg.TUNING.ADAPTFORMER.SCALE)
