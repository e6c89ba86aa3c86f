"""The contract between the segmentor, the Fisher information and a segmentation head.

Shapes:
    B: images in the batch; C: classes; H, W: the padded images, in pixels
    h, w: the map that a head predicts
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol, cast, runtime_checkable

import torch
from detectron2.modeling import Backbone
from torch import Tensor, nn

from .detectron2_heads import DETECTRON2_HEADS, Detectron2Head, PixelHead
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
        ...

    def predict(self, features: dict[str, Tensor]) -> Any:
        """Computes the predictions of a whole batch, from which the next two methods start."""

    def loss_of_image(self, predictions: Any, targets: SegmentationTargets, image: int) -> Tensor:
        """Sums the weighted losses of one image, as if it were a batch of its own; scalar."""
        ...

    def log_probabilities(self, predictions: Any) -> Tensor:
        """Returns (B, C, h, w): the logarithm of each class's probability, at `stride`."""
        ...

    def loss_divisors(self, labels: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Returns the divisor of each loss, with which the losses of a batch's parts add up.

        Args:
            labels: for each image (height, width), of any integer type.

        Returns:
            Numbers or scalars by the losses' names.
        """
        ...


def segmentation_head(head: nn.Module, backbone: Backbone) -> SegmentationHead:
    """Returns the head that the segmentor calls: the head itself, or an adapter of Detectron2's.

    Args:
        head: the head that MODEL.SEM_SEG_HEAD.NAME built. Its parameters stay where they are.
        backbone: the backbone whose maps the head reads.

    Returns:
        ``head`` if it has the contract, else a `PixelHead` of it.

    Raises:
        ValueError: if the head has neither the contract nor the methods of Detectron2's heads.
    """
    if isinstance(head, SegmentationHead):
        return head
    try:
        return PixelHead(
            cast(Detectron2Head, head), backbone.output_shape(), backbone.size_divisibility
        )
    except AttributeError as error:
        raise ValueError(_refusal(head, str(error))) from error


def require_drivable(head: nn.Module, backbone: Backbone) -> None:
    """Tries one of Detectron2's heads on maps of zeros, so that it cannot fail after training.

    A head that cannot be driven raises a ValueError with the reason and the heads that work.

    Args:
        head: see `segmentation_head`.
        backbone: see `segmentation_head`.
    """
    driven = segmentation_head(head, backbone)
    if isinstance(driven, PixelHead):
        _try_out(driven)


def require_splittable(head: nn.Module, backbone: Backbone) -> None:
    """Refuses one of Detectron2's heads if the losses of a batch's parts do not add up.

    A loss without a known divisor raises a ValueError, see `require_divisors`.

    Args:
        head: see `segmentation_head`.
        backbone: see `segmentation_head`.
    """
    driven = segmentation_head(head, backbone)
    if isinstance(driven, PixelHead):
        label = torch.zeros(1, 1, dtype=torch.int64)
        require_divisors(_try_out(driven), driven.loss_divisors([label]))


def require_divisors(losses: Iterable[str], divisors: Iterable[str]) -> None:
    """Refuses losses without a known divisor.

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
                f"its divisor is not known (known: {', '.join(sorted(known))}): set "
                "SOLVER.ACCUMULATE 1, or give the head all methods of "
                "fishertune_d2.modeling.heads.SegmentationHead, loss_divisors among them"
            )


def kind_of_loss(name: str) -> str:
    """Returns a loss's name without the number of its prediction: loss_ce of loss_ce_3."""
    return re.sub(r"_\d+$", "", name)


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Puts a module in evaluation mode for a while, then each part back in its own mode."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _try_out(driven: PixelHead) -> dict[str, Tensor]:
    """Returns the losses of maps of zeros; leaves modes and random numbers as they are."""
    try:
        # Evaluation mode: dropout would draw random numbers, and norms would update statistics.
        with in_eval_mode(driven.head), torch.no_grad():
            return driven.try_out()
    except Exception as error:  # each head has its own kinds of errors
        raise ValueError(_refusal(driven.head, str(error))) from error


def _refusal(head: nn.Module, why: str) -> str:
    name = type(head).__name__
    if name in DETECTRON2_HEADS:
        return f"MODEL.SEM_SEG_HEAD.NAME {name} cannot work with its keys: {why}"
    return (
        f"MODEL.SEM_SEG_HEAD.NAME is {name}, which VFMSegmentor cannot drive: {why}. "
        f"{WORKING_HEADS}"
    )
