"""What `VFMBackbone` asks a family of timm's models, such as plain ViTs or ConvNeXts.

Shapes: B images, D channels, (h, w) cells of a map, (H, W) pixels.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Family(Protocol):
    """How the parts of a family's models are found and read.

    Attributes:
        channels_first: whether the outputs of the perturbation points are maps (B, D, h, w).
    """

    channels_first: bool

    def patch_size(self, asked: int, trained: int) -> int:
        """Returns the side in pixels to whose multiples images are padded.

        Args:
            asked: MODEL.VFM.PATCH_SIZE; 0 for the size of the training.
            trained: the size in the training.
        """
        ...

    def timm_args(self, img_size: Sequence[int], patch_size: int) -> Mapping[str, Any]:
        """Returns the arguments of ``timm.create_model`` that depend on sizes in pixels."""
        ...

    def taps(self, model: Any) -> list[int]:
        """Returns the indices of the four outputs that form the pyramid."""
        ...

    def channels(self, model: Any) -> list[int]:
        """Returns the widths D of the four maps."""
        ...

    def strides(self, patch_size: int) -> list[int]:
        """Returns the pixels between the cells of the four outputs as they are."""
        ...

    def blocks(self, model: Any) -> list[nn.Module]:
        """Returns the blocks, from shallow to deep."""
        ...

    def perturbation_points(self, model: Any) -> list[nn.Module]:
        """Returns the four modules whose output Eq. 6 perturbs."""
        ...

    def require_size(self, model: Any, size: Sequence[int]) -> None:
        """Refuses padded images of (H, W) with which the current export cannot work."""
        ...

    def pyramid(
        self, maps: Sequence[Tensor], patch_size: int, size: Sequence[int]
    ) -> dict[str, Tensor]:
        """Returns "res2" to "res5", (B, D, ceil(H/s), ceil(W/s)) at s = 4, 8, 16, 32.

        Args:
            maps: the four outputs, from shallow to deep, (B, D, h, w).
            patch_size: the result of the method of this name.
            size: (H, W) of the images before they were padded.
        """
        ...
