"""A learned pyramid from four maps of a plain ViT, as in tqdm (Pak et al., ECCV 2024).

Shapes: B images, D channels, (h, w) patches.
"""

from collections.abc import Sequence

from detectron2.layers import get_norm
from torch import Tensor, nn
from torch.nn import functional as F


class PatchNeck(nn.Module):
    """Enlarges the two shallow maps by transposed convolutions, and halves the deepest one."""

    def __init__(self, channels: int, norm: str):
        """Builds the neck for D = ``channels``; ``norm`` is a name of Detectron2's ``get_norm``."""
        super().__init__()
        self.to_quarter = nn.Sequential(
            _twice(channels), get_norm(norm, channels) or nn.Identity(), nn.GELU(), _twice(channels)
        )
        self.to_half = _twice(channels)

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Resamples the maps.

        Args:
            maps: four (B, D, h, w), from shallow to deep.

        Returns:
            (B, D, 4 h, 4 w), (B, D, 2 h, 2 w), (B, D, h, w) and (B, D, ceil(h/2), ceil(w/2)).
        """
        shallow, second, third, deep = maps
        halved = F.max_pool2d(deep, kernel_size=2, ceil_mode=True)
        return [self.to_quarter(shallow), self.to_half(second), third, halved]


def _twice(channels: int) -> nn.ConvTranspose2d:
    return nn.ConvTranspose2d(channels, channels, kernel_size=2, stride=2)
