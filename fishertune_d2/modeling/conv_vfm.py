"""timm's ConvNeXts: how `VFMBackbone` reads them.

A ConvNeXt has four stages of strides 4, 8, 16 and 32, so its maps are a pyramid as they are. Each
block is a depthwise convolution, a norm and two pointwise layers.

Shapes: B images, D channels of a stage, (h, w) cells of its map, (H, W) pixels.
"""

from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

from torch import Tensor, nn

from fishertune_d2.fisher.perturb import thirds_of_depth

from .pyramid import STRIDES


class ConvNeXts:
    """Stages of growing width and stride; see `Family`."""

    channels_first = True

    def patch_size(self, asked: int, trained: int) -> int:
        """The stride of the last stage, which is a part of the architecture."""
        return trained

    def timm_args(self, img_size: Sequence[int], patch_size: int) -> Mapping[str, Any]:
        """None: a ConvNeXt stores no positions."""
        return {}

    def taps(self, model: nn.Module) -> list[int]:
        """All four stages."""
        return list(range(len(STRIDES)))

    def channels(self, model: Any) -> list[int]:
        """The width of each stage."""
        return [stage["num_chs"] for stage in model.feature_info]

    def strides(self, patch_size: int) -> list[int]:
        """Those of the pyramid."""
        return list(STRIDES)

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        """The blocks of all stages."""
        stages = model.get_submodule("stages").children()
        return [block for stage in stages for block in stage.get_submodule("blocks").children()]

    def perturbation_points(self, model: nn.Module) -> list[nn.Module]:
        """The stem, and the blocks at 1/3, 1/2 and 2/3 of the depth, which runs over all stages."""
        blocks = self.blocks(model)
        return [model.get_submodule("stem"), *(blocks[i] for i in thirds_of_depth(len(blocks)))]

    def require_size(self, model: nn.Module, size: Sequence[int]) -> None:
        """Accepts all sizes."""

    def pyramid(
        self, maps: Sequence[Tensor], patch_size: int, size: Sequence[int]
    ) -> dict[str, Tensor]:
        """The maps (B, D, h, w), without the cells that cover no pixel of the images."""
        return {
            f"res{i}": features[..., : ceil(size[0] / stride), : ceil(size[1] / stride)]
            for i, (features, stride) in enumerate(zip(maps, STRIDES, strict=True), start=2)
        }
