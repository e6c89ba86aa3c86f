"""What the segmentor and the Fisher information need of a segmentation head, and which heads work.

Shapes:
    B: images in the batch; C: classes; H, W: the padded images, in pixels
    h, w: the map that a head predicts
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn

from .detectron2_heads import DETECTRON2_HEADS, PixelHead
from .targets import SegmentationTargets

# Heads that need no adapter, by the names of MODEL.SEM_SEG_HEAD.NAME.
_OWN_HEADS = ("Mask2FormerHead",)
WORKING_HEADS = (
    f"These heads work: {', '.join((*_OWN_HEADS, *DETECTRON2_HEADS))}, and heads of your own with "
    "the methods of fishertune_d2.modeling.heads.SegmentationHead"
)


@runtime_checkable
class SegmentationHead(Protocol):
    """The contract of a head.

    Attributes:
        num_classes: C.
        ignore_value: the label of a pixel without a class.
        stride: pixels between the cells of `log_probabilities`.
    """

    num_classes: int
    ignore_value: int
    stride: int

    def __call__(
        self,
        features: dict[str, Tensor],
        targets: SegmentationTargets | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Computes the losses, or without targets the scores.

        Args:
            features: the backbone's maps (B, channels, H / stride, W / stride) by name.
            targets: the labels of the batch.
            image_size: (H, W) of the scores.

        Returns:
            With targets (None, weighted losses of the batch by name), else (scores (B, C, H, W)
            that are not negative, {}).
        """

    def predict(self, features: dict[str, Tensor]) -> Any:
        """Computes what the next two methods take, of a whole batch."""

    def loss_of_image(self, predictions: Any, targets: SegmentationTargets, image: int) -> Tensor:
        """The sum of the weighted losses of one image, as if it were a batch of its own; scalar."""

    def log_probabilities(self, predictions: Any) -> Tensor:
        """(B, C, h, w): the logarithm of each class's probability, at `stride`."""

    def loss_divisors(self, labels: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """What each loss of a batch is divided by, so that those of its parts can be put together.

        Args:
            labels: of each image (height, width), of any integer type.

        Returns:
            Numbers or scalars by the losses' names.
        """


def segmentation_head(
    head: nn.Module, shapes: Mapping[str, ShapeSpec], divisibility: int
) -> SegmentationHead:
    """A head as the segmentor drives it: itself, or one of Detectron2's in an adapter.

    Args:
        head: what MODEL.SEM_SEG_HEAD.NAME built. Its parameters stay where they are.
        shapes: the backbone's ``output_shape()``.
        divisibility: the backbone's ``size_divisibility``, in pixels.

    Raises:
        ValueError: if the head has neither the contract nor the methods of Detectron2's heads.
    """
    if isinstance(head, SegmentationHead):
        return head
    try:
        return PixelHead(head, shapes, divisibility)
    except AttributeError as error:
        raise ValueError(_refusal(head, str(error))) from error


def require_drivable(head: nn.Module, shapes: Mapping[str, ShapeSpec], divisibility: int) -> None:
    """Tries one of Detectron2's heads on maps of zeros, so that it does not fail after training.

    Args:
        head: as in `segmentation_head`.
        shapes: as in `segmentation_head`.
        divisibility: as in `segmentation_head`.

    Raises:
        ValueError: if the head cannot be driven; says why, and which heads can.
    """
    driven = segmentation_head(head, shapes, divisibility)
    if driven is not head:
        _try_out(head, driven)


def require_splittable(head: nn.Module, shapes: Mapping[str, ShapeSpec], divisibility: int) -> None:
    """Refuses one of Detectron2's heads whose loss of a batch is no sum over parts of it.

    Args:
        head: as in `segmentation_head`.
        shapes: as in `segmentation_head`.
        divisibility: as in `segmentation_head`.

    Raises:
        ValueError: if the head does not say what one of its losses is divided by.
    """
    driven = segmentation_head(head, shapes, divisibility)
    if driven is not head:
        label = torch.zeros(1, 1, dtype=torch.int64)
        require_divisors(_try_out(head, driven), driven.loss_divisors([label]))


def require_divisors(losses: Iterable[str], divisors: Iterable[str]) -> None:
    """Refuses losses of which it is not known what they are divided by.

    Args:
        losses: their names, those of single predictions with a number at the end.
        divisors: the names that ``loss_divisors`` gives.

    Raises:
        ValueError: names the loss and the remedy.
    """
    known = set(divisors)
    for name in losses:
        if kind_of_loss(name) not in known:
            raise ValueError(
                f"the head's loss {name} of a batch cannot be put together from its parts, because "
                f"nothing says what it is divided by (known: {', '.join(sorted(known))}): set "
                "SOLVER.ACCUMULATE 1, or give the head all methods of "
                "fishertune_d2.modeling.heads.SegmentationHead, loss_divisors among them"
            )


def kind_of_loss(name: str) -> str:
    """A loss's name without the number of its prediction: loss_ce of loss_ce_3."""
    return re.sub(r"_\d+$", "", name)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; every part has its own mode again afterwards."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _try_out(head: nn.Module, driven: PixelHead) -> dict[str, Tensor]:
    """Losses of maps of zeros, by name; leaves modes and random numbers as they are."""
    try:
        # No dropout, which would draw random numbers, and no statistics.
        with in_eval_mode(head), torch.no_grad():
            return driven.try_out()
    except Exception as error:  # of a kind that only the head knows
        raise ValueError(_refusal(head, str(error))) from error


def _refusal(head: nn.Module, why: str) -> str:
    name = type(head).__name__
    if name in DETECTRON2_HEADS:
        return f"MODEL.SEM_SEG_HEAD.NAME {name} cannot work with its keys: {why}"
    return (
        f"MODEL.SEM_SEG_HEAD.NAME is {name}, which VFMSegmentor cannot drive: {why}. "
        f"{WORKING_HEADS}"
    )
