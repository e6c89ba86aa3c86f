"""Detectron2's semantic segmentation heads, which predict a logit for each class and pixel.

Shapes:
    B: images in the batch; C: classes; H, W: the padded images, in pixels
    h, w: the map that the head predicts, at ``common_stride``
"""

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import ceil, lcm

import torch
from detectron2.layers import ASPP, ShapeSpec
from detectron2.projects.deeplab.semantic_seg import DeepLabV3Head
from torch import Tensor, nn
from torch.nn import functional as F

from .targets import SegmentationTargets, present_classes

DETECTRON2_HEADS = ("SemSegFPNHead", "DeepLabV3PlusHead", "DeepLabV3Head")


class Detectron2Head(nn.Module):
    """The parts of Detectron2's heads that `PixelHead` needs, for annotations only."""

    predictor: nn.Conv2d
    losses: Callable[[Tensor, Tensor], dict[str, Tensor]]
    layers: Callable[[dict[str, Tensor]], Tensor]
    in_features: list[str]
    common_stride: int
    ignore_value: int


class PixelHead:
    """Drives a head of Detectron2 as a `SegmentationHead`.

    It is a plain object beside the head, so that the head's parameters keep their names. It calls
    the head's ``losses``, so LOSS_WEIGHT and LOSS_TYPE hold. The scores are probabilities: the
    softmax of the logits at the image's size. So averages over sliding windows are averages of
    probabilities, while Detectron2 averages logits.

    The heads double maps in size, so all maps must cover the same area. The last cell of a map of a
    ViT's pyramid may extend beyond the image, so maps are extended at the bottom and the right. For
    a head that pools over windows of the training crop, they are extended to a multiple of it.

    Args:
        head: has the parts of `Detectron2Head`. A missing part raises an AttributeError that names
            it.
        shapes: the backbone's ``output_shape()``.
        divisibility: the sides of padded images are multiples of this number of pixels.
    """

    def __init__(self, head: Detectron2Head, shapes: Mapping[str, ShapeSpec], divisibility: int):
        self.head = head
        self.num_classes = head.predictor.out_channels
        self.ignore_value = head.ignore_value
        self.stride = head.common_stride
        self.losses_of_logits = head.losses
        self.layers = _layers(head)
        self.shapes = {name: shapes[name] for name in head.in_features}
        self.divisibility = max(1, divisibility)

    def __call__(
        self,
        features: dict[str, Tensor],
        targets: SegmentationTargets | None = None,
        image_size: tuple[int, int] | None = None,
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Computes the losses, or without targets the probabilities; see `SegmentationHead`."""
        logits = self.predict(features)
        if targets is not None:
            return None, self._losses(logits, targets)
        if image_size is not None:
            logits = F.interpolate(
                logits, scale_factor=self.stride, mode="bilinear", align_corners=False
            )
            logits = logits[..., : image_size[0], : image_size[1]]
        return logits.softmax(1), {}

    def predict(self, features: dict[str, Tensor]) -> Tensor:
        """Computes the logits (B, C, h, w) float32; they may cover more than the images."""
        strides = {name: shape.stride for name, shape in self.shapes.items()}
        covered = [
            max(features[name].shape[axis] * stride for name, stride in strides.items())
            for axis in (-2, -1)
        ]
        wanted = [
            ceil(extent / unit) * unit
            for extent, unit in zip(covered, self._multiple(), strict=True)
        ]
        maps = {
            name: _extended(features[name], [extent // stride for extent in wanted])
            for name, stride in strides.items()
        }
        return self.layers(maps).float()

    def loss_of_image(
        self, predictions: Tensor, targets: SegmentationTargets, image: int
    ) -> Tensor:
        """Computes the head's loss on one image, as if it were a batch of its own; scalar."""
        own = self._losses(predictions[image : image + 1], targets.of_image(image))
        return reduce(torch.add, own.values())

    def log_probabilities(self, predictions: Tensor) -> Tensor:
        """Returns (B, C, h, w): the logarithm of the softmax of the logits."""
        return predictions.log_softmax(1)

    def loss_divisors(self, labels: Sequence[Tensor]) -> dict[str, Tensor | float]:
        """Returns the number of labelled pixels, over which ``loss_sem_seg`` is a mean; at least 1.

        Raises:
            ValueError: if a label is no class, or the loss takes a batch's hardest pixels.
        """
        kind = getattr(self.head, "loss_type", "cross_entropy")
        if kind != "cross_entropy":
            raise ValueError(
                f"MODEL.SEM_SEG_HEAD.LOSS_TYPE {kind} picks the hardest pixels of a whole batch, "
                "which no part of a batch knows: set SOLVER.ACCUMULATE 1, or LOSS_TYPE "
                "cross_entropy"
            )
        present_classes(labels, self.num_classes, self.ignore_value)
        count = sum(int((label != self.ignore_value).sum()) for label in labels)
        return {"loss_sem_seg": float(max(1, count))}

    def try_out(self) -> dict[str, Tensor]:
        """Returns the losses of maps of zeros.

        An error of the head itself passes through, if no other COMMON_STRIDE would help.

        Raises:
            ValueError: if the padded training crop is not the window that the head pools over, or
                the head does not predict maps of zeros.
        """
        size, largest = self._multiple(), max(shape.stride for shape in self.shapes.values())
        if _pooled_cells(self.head):
            padded = [ceil(side / self.divisibility) * self.divisibility for side in size]
            if tuple(ceil(side / largest) * largest for side in padded) != size:
                raise ValueError(
                    f"it pools over INPUT.CROP.SIZE {list(size)}, which is padded to {padded} for "
                    f"the backbone: choose a multiple of {lcm(self.divisibility, largest)}, or set "
                    "INPUT.CROP.ENABLED False"
                )
        else:
            size = (2 * size[0], 2 * size[1])  # norms refuse a map of one cell
        device = next(self.head.parameters()).device
        logits = self._predict_zeros(size, device)
        pixels = torch.zeros(1, *size, dtype=torch.int64, device=device)
        targets = SegmentationTargets(pixels, [torch.zeros(1, dtype=torch.int64)])
        return self._losses(logits, targets)

    def _predict_zeros(self, size: tuple[int, int], device: torch.device) -> Tensor:
        """Predicts maps of zeros, and refuses a COMMON_STRIDE that the head's maps do not have."""
        features = {
            name: torch.zeros(
                1, shape.channels, *(side // shape.stride for side in size), device=device
            )
            for name, shape in self.shapes.items()
        }
        smallest = min(shape.stride for shape in self.shapes.values())
        remedy = (
            f"set MODEL.SEM_SEG_HEAD.COMMON_STRIDE {smallest}, the smallest stride of IN_FEATURES "
            f"{list(self.shapes)}"
        )
        try:
            logits = self.predict(features)
        except RuntimeError as error:  # the head adds maps of different sizes
            if self.stride == smallest:
                raise
            raise ValueError(
                f"at MODEL.SEM_SEG_HEAD.COMMON_STRIDE {self.stride} its maps differ in size "
                f"({error}): {remedy}"
            ) from error
        wanted = (1, self.num_classes, *(side // self.stride for side in size))
        if tuple(logits.shape) != wanted:
            raise ValueError(
                f"for an image of {size[0]} x {size[1]} pixels it predicts {tuple(logits.shape)}, "
                f"but MODEL.SEM_SEG_HEAD.COMMON_STRIDE {self.stride} asks for {wanted}: {remedy}"
            )
        return logits

    def _multiple(self) -> tuple[int, int]:
        """Returns the height and width in pixels whose multiples all maps can cover."""
        strides = [shape.stride for shape in self.shapes.values()]
        unit, largest = lcm(self.stride, *strides), max(strides)
        rows, columns = _pooled_cells(self.head) or (1, 1)
        return lcm(unit, rows * largest), lcm(unit, columns * largest)

    def _losses(self, logits: Tensor, targets: SegmentationTargets) -> dict[str, Tensor]:
        lack = [
            cells * self.stride - side
            for cells, side in zip(logits.shape[-2:], targets.pixels.shape[-2:], strict=True)
        ]
        pixels = F.pad(targets.pixels.long(), (0, lack[1], 0, lack[0]), value=self.ignore_value)
        losses = self.losses_of_logits(logits, pixels)
        if any(len(classes) for classes in targets.classes):
            return losses
        # A mean over no pixel is NaN; this is 0, and every parameter stays in the graph.
        return {name: 0.0 * logits.sum() for name in losses}


def _layers(head: Detectron2Head) -> Callable[[dict[str, Tensor]], Tensor]:
    """Returns the function that computes a head's logits from the maps."""
    if isinstance(head, DeepLabV3Head):  # the only head without a method for it
        return lambda maps: head.predictor(head.aspp(maps[head.in_features[0]]))
    return head.layers


def _pooled_cells(head: nn.Module) -> tuple[int, int] | None:
    """Returns the window, in cells of the coarsest map, over which the head pools, if any."""
    sizes = (part.pool_kernel_size for part in head.modules() if isinstance(part, ASPP))
    return next(sizes, None)


def _extended(features: Tensor, size: Sequence[int]) -> Tensor:
    """Repeats the last cells at the bottom and the right up to a size."""
    bottom, right = (wanted - own for wanted, own in zip(size, features.shape[-2:], strict=True))
    if not bottom and not right:
        return features
    return F.pad(features, (0, right, 0, bottom), mode="replicate")
