"""A simulated unseen domain that shifts the images of a batch, in place of Eq. 6 on features.

Shapes: B images; an image (3, H, W) uint8, RGB or BGR.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from .batch_losses import mixed_seed
from .perturb import Perturbation

# An RGB image (H, W, 3) uint8 and a random generator -> the shifted image, of the same kind.
Shift = Callable[[np.ndarray, np.random.Generator], np.ndarray]
# The mean of Eq. 7's weight exp(-(|a| + |b|)) over a and b from N(0, 1). An image shift draws
# neither, so each image gets this weight, and dF counts as much as with Eq. 6.
MEAN_WEIGHT = (math.exp(0.5) * math.erfc(math.sqrt(0.5))) ** 2


class ImageShift(Perturbation):
    """Shifts each image by a photometric shift, such as towards night or fog.

    Args:
        shift: shifts one image.
        name: its name in the estimate's notes.
        bgr: whether the images of a batch are in BGR order.
    """

    draws_in_model = False

    def __init__(self, shift: Shift, name: str, bgr: bool = False):
        self.shift = shift
        self.name = name
        self.bgr = bgr

    def notes(self) -> dict[str, str]:
        """The name of the shift."""
        return {"shift": self.name}

    def shifted(self, batch: Sequence, images: Sequence[int], seed: int) -> list[dict]:
        """The batch with shifted images; the same ones for the same seed and indices."""
        return [
            {**item, "image": self._shift(item["image"], mixed_seed(seed, image))}
            for item, image in zip(batch, images, strict=True)
        ]

    def _shift(self, image: Tensor, seed: int) -> Tensor:
        pixels = image.permute(1, 2, 0).to("cpu", torch.uint8).numpy()
        rgb = np.ascontiguousarray(pixels[..., ::-1] if self.bgr else pixels)
        changed = self.shift(rgb, np.random.default_rng(seed))
        changed = np.ascontiguousarray(changed[..., ::-1] if self.bgr else changed)
        return torch.from_numpy(changed).permute(2, 0, 1).to(image)

    @contextmanager
    def drawing(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Changes nothing in the model, because the images themselves are shifted."""
        yield

    @contextmanager
    def replaying(self, image: int) -> Iterator[None]:
        """Changes nothing in the model, because the images themselves are shifted."""
        yield

    def weights(self, batch: Sequence) -> Tensor:
        """The same weight for each image of the batch, (B,)."""
        return torch.full((len(batch),), MEAN_WEIGHT)
