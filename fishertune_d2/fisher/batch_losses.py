"""The losses of one batch, on x or on x', asked for together or image by image.

Shapes: B images in the batch; losses (B,).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from .perturb import StatisticsPerturbation

LossFn = Callable[[nn.Module, Sequence], Tensor]

# The seed of the batch that is measured now, and which of its images loss_fn was given.
_measured: ContextVar[tuple[int, Sequence[int]] | None] = ContextVar("measured", default=None)


class BatchLosses:
    """What an estimator sees of a batch.

    Both ways give the same numbers, if ``loss_fn`` gives an image the same loss whatever batch it
    comes in; on x' because what Eq. 6 drew for the whole batch is replayed for each image.

    Args:
        model: what ``loss_fn`` is given.
        batch: B images.
        loss_fn: ``(model, batch) -> (B,)``.
        perturb: makes x' of x; None for x itself.
        seed: of the random numbers of this batch, the same on x and on x'.
        name: of the batch in error messages.
        autocast: dtype to compute the losses in where autocast says so; None for no autocast.
        device_type: where they are computed.

    Attributes:
        size: B.
        seed: as above.
    """

    def __init__(
        self,
        model: nn.Module,
        batch: Sequence,
        loss_fn: LossFn,
        *,
        perturb: StatisticsPerturbation | None,
        seed: int,
        name: str,
        autocast: torch.dtype | None,
        device_type: str,
    ):
        self.size = len(batch)
        self.seed = seed
        self._model, self._batch, self._loss_fn = model, batch, loss_fn
        self._perturb, self._name = perturb, name
        self._autocast, self._device_type = autocast, device_type
        self._drawn = perturb is None

    def together(self) -> Tensor:
        """The losses of all images from one forward pass, (B,).

        Raises:
            ValueError: if ``loss_fn`` returns another shape.
            FloatingPointError: if a loss is not finite, with the image.
        """
        with seeded(self.seed), self._drawing():
            return self._losses(self._batch, range(self.size))

    def alone(self, image: int) -> Tensor:
        """The loss of one image from a forward pass over that image, a scalar.

        Raises:
            ValueError: if ``loss_fn`` returns another shape than (1,).
            FloatingPointError: if the loss is not finite, with the image.
        """
        if not self._drawn:
            with torch.no_grad():
                self.together()
        replaying = nullcontext() if self._perturb is None else self._perturb.replaying(image)
        with seeded(self.seed, image), replaying:
            return self._losses(self._batch[image : image + 1], [image])[0]

    def place(self, image: int) -> str:
        """How to call an image in an error message."""
        item = self._batch[image]
        file = item.get("file_name") if isinstance(item, Mapping) else None
        domain = "" if self._perturb is None else "shifted "
        return f"{domain}image {image} of {self._name}" + (f" ({file})" if file else "")

    @contextmanager
    def _drawing(self) -> Iterator[None]:
        if self._perturb is None:
            yield
            return
        # A generator of its own: the loss's random numbers must not depend on the shift.
        with self._perturb.drawing(torch.Generator().manual_seed(mixed_seed(self.seed, -1))):
            yield
        self._drawn = True

    def _losses(self, batch: Sequence, images: Sequence[int]) -> Tensor:
        enabled = self._autocast is not None
        token = _measured.set((self.seed, images))
        try:
            with torch.autocast(self._device_type, dtype=self._autocast, enabled=enabled):
                losses = self._loss_fn(self._model, batch)
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
    """A seed for each image that a ``loss_fn`` was called with, the same in whatever batch it is.

    A loss that draws random numbers for an image draws them under :func:`seeded` with that image's
    seed; x and x', and a loop and a batch, then see the same ones.

    Args:
        count: how many images the loss was called with.
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
    """Random numbers that depend on ``numbers`` alone; the global state is put back after."""
    # A run on the CPU must not start CUDA, which takes a GPU's memory in every process.
    gpus = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(gpus)):
        torch.manual_seed(mixed_seed(*numbers))
        yield
