"""The losses of one batch, on x or on x', for all images together or one by one.

Shapes: B images in the batch; losses (B,).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .perturb import Perturbation

LossFn = Callable[[nn.Module, Sequence], Tensor]

# The seed of the current batch, and the indices of the images that loss_fn is called with.
_measured: ContextVar[tuple[int, Sequence[int]] | None] = ContextVar("measured", default=None)


@dataclass(kw_only=True)
class BatchLosses:
    """The losses of one batch, as an estimator asks for them: together, or image by image.

    Both ways give the same numbers if an image's loss does not depend on its batch. On x', each
    image replays the draws of Eq. 6 for the whole batch.

    Attributes:
        model: the first argument of ``loss_fn``.
        batch: B images.
        loss_fn: ``(model, batch) -> (B,)``.
        perturb: makes x' of x; None for x itself.
        seed: seed of this batch's random numbers, the same on x and on x'.
        name: the batch's name in error messages.
        autocast: autocast's dtype; None for no autocast.
        device_type: the type of the device that computes the losses.
    """

    model: nn.Module
    batch: Sequence
    loss_fn: LossFn
    perturb: Perturbation | None
    seed: int
    name: str
    autocast: torch.dtype | None
    device_type: str
    _drawn: bool = False

    @property
    def size(self) -> int:
        """B."""
        return len(self.batch)

    def together(self) -> Tensor:
        """The losses of all images from one forward pass, (B,)."""
        # Its own generator, because the loss's random numbers must not depend on the shift.
        generator = torch.Generator().manual_seed(mixed_seed(self.seed, -1))
        drawing = nullcontext() if self.perturb is None else self.perturb.drawing(generator)
        with seeded(self.seed), drawing:
            losses = self._losses(self.batch, range(self.size))
        self._drawn = True
        return losses

    def alone(self, image: int) -> Tensor:
        """The loss of one image, given by its index, from a forward pass over it alone; ()."""
        if self.perturb is not None and self.perturb.draws_in_model and not self._drawn:
            with torch.no_grad():
                self.together()
        replaying = nullcontext() if self.perturb is None else self.perturb.replaying(image)
        with seeded(self.seed, image), replaying:
            return self._losses(self.batch[image : image + 1], [image])[0]

    def place(self, image: int) -> str:
        """The name of an image in an error message."""
        item = self.batch[image]
        file = item.get("file_name") if isinstance(item, Mapping) else None
        domain = "" if self.perturb is None else "shifted "
        return f"{domain}image {image} of {self.name}" + (f" ({file})" if file else "")

    def _losses(self, batch: Sequence, images: Sequence[int]) -> Tensor:
        if self.perturb is not None:
            batch = self.perturb.shifted(batch, images, self.seed)
        enabled = self.autocast is not None
        token = _measured.set((self.seed, images))
        try:
            with torch.autocast(self.device_type, dtype=self.autocast, enabled=enabled):
                losses = self.loss_fn(self.model, batch)
        finally:
            _measured.reset(token)
        if losses.shape != (len(images),):
            raise ValueError(
                f"loss_fn must return one loss per image, shape ({len(images)},): it returned "
                f"{tuple(losses.shape)}"
            )
        for image, finite in zip(images, losses.isfinite().tolist(), strict=True):
            if not finite:
                raise FloatingPointError(f"the loss is not finite on {self.place(image)}")
        return losses


def image_seeds(count: int) -> list[int]:
    """A seed for each image that a ``loss_fn`` is called with, independent of the batch's make-up.

    A loss that needs random numbers for an image should draw them under :func:`seeded` with that
    image's seed. Then x and x', and a loop and a batch, see the same numbers.

    Args:
        count: the number of images that the loss is called with.

    Returns:
        The seeds, one for each image.
    """
    seed, images = _measured.get() or (torch.initial_seed(), range(count))
    return [mixed_seed(seed, image) for image in images]


def mixed_seed(*numbers: int) -> int:
    """One seed from several numbers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 7) % (2**63)
    return seed


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Makes random numbers depend on ``numbers`` alone; restores the global state afterwards."""
    # A run on the CPU must not start CUDA, which takes a GPU's memory in every process.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        torch.manual_seed(mixed_seed(*numbers))
        yield
