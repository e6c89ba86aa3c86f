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

WORKING_HEADS = (
    "These heads work: Mask2FormerHead, MaskTextHead, TextQueryHead, "
    f"{', '.join(DETECTRON2_HEADS)}, and heads of your own with the methods of "
    "fishertune_d2.modeling.heads.SegmentationHead"
)


@runtime_checkable
class SegmentationHead(Protocol):
    """The contract of a head.

    Attributes:
        num_classes: C.
        ignore_value: the label of a pixel without a class.
    """

    num_classes: int
    ignore_value: int

    @property
    def stride(self) -> float:
        """Pixels between the cells of `log_probabilities`."""
        ...

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
    """Returns a head that has the contract: ``head`` itself, or a `PixelHead` of Detectron2's.

    The parameters of ``head`` stay where they are. It reads the maps of ``backbone``.

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


def try_out(head: SegmentationHead) -> dict[str, Tensor]:
    """Tries one of Detectron2's heads on maps of zeros, so that it cannot fail after training.

    Leaves modes and random numbers as they are.

    Returns:
        The losses by name; empty for other heads, which are not tried.

    Raises:
        ValueError: if the head cannot be driven, with the reason and the heads that work.
    """
    if not isinstance(head, PixelHead):
        return {}
    try:
        # Evaluation mode: dropout would draw random numbers, and norms would update statistics.
        with in_eval_mode(head.head), torch.no_grad():
            return head.try_out()
    except Exception as error:  # each head has its own kinds of errors
        raise ValueError(_refusal(head.head, str(error))) from error


def require_divisors(losses: Iterable[str], divisors: Iterable[str]) -> None:
    """Refuses losses without a known divisor; loss_ce_3 has the divisor of loss_ce.

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


def _refusal(head: nn.Module, why: str) -> str:
    name = type(head).__name__
    if name in DETECTRON2_HEADS:
        return f"MODEL.SEM_SEG_HEAD.NAME {name} cannot work with its keys: {why}"
    unable = f"MODEL.SEM_SEG_HEAD.NAME is {name}, which VFMSegmentor cannot drive"
    return f"{unable}: {why}. {WORKING_HEADS}"
