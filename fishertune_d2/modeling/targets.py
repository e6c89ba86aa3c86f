"""The labels of a batch in Mask2Former's form: one binary mask for each class of an image.

The shapes of the masks depend on the classes of an image, so the host has to know the classes. It
reads them before it uploads the labels, so that it does not wait for a GPU.

Shapes:
    B: images in the batch; C: classes; n: classes in an image
    H, W: the padded images, in pixels
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class SegmentationTargets(NamedTuple):
    """The labels of a batch.

    Attributes:
        pixels: the class of each pixel, (B, H, W) of any integer type, on the device of the losses.
        classes: for each image the classes in it, ascending, (n,) int64 on the CPU.
    """

    pixels: Tensor
    classes: list[Tensor]

    def of_image(self, image: int) -> "SegmentationTargets":
        """Returns the labels of one image, as a batch of its own."""
        return SegmentationTargets(self.pixels[image : image + 1], [self.classes[image]])


def present_classes(labels: Sequence[Tensor], num_classes: int, ignore_value: int) -> list[Tensor]:
    """Finds the classes in each image.

    Args:
        labels: for each image the class of each pixel, (H, W) of any integer type. For labels on a
            GPU the host waits once for each image.
        num_classes: C.
        ignore_value: the value of unlabelled pixels.

    Returns:
        For each image its classes, ascending, (n,) int64 on the CPU.

    Raises:
        ValueError: if a value is neither in 0 .. C - 1 nor ``ignore_value``.
    """
    found = []
    for index, label in enumerate(labels):
        present = _values(label)
        present = present[present != ignore_value]
        wrong = present[(present < 0) | (present >= num_classes)]
        if len(wrong):
            raise ValueError(
                f"sem_seg of image {index} of the batch holds {wrong.tolist()}; allowed are 0 to "
                f"{num_classes - 1} (MODEL.SEM_SEG_HEAD.NUM_CLASSES = {num_classes}) and "
                f"{ignore_value} (IGNORE_VALUE). Map the label ids to training ids first."
            )
        found.append(present)
    return found


def semantic_masks(targets: SegmentationTargets) -> tuple[list[Tensor], list[Tensor]]:
    """Returns for each image its masks (n, H, W) float32 of 0 and 1, and their classes (n,) int64.

    Both are on the device of the pixels. As in the published code, an ignored pixel (also padding)
    is 0 in every mask. So the losses treat it as background; they do not leave it out.
    """
    counts = [len(classes) for classes in targets.classes]
    labels = torch.cat(targets.classes).to(targets.pixels.device, non_blocking=True).split(counts)
    masks = [
        (pixels == classes[:, None, None]).float()
        for pixels, classes in zip(targets.pixels, labels, strict=True)
    ]
    return masks, list(labels)


def _values(label: Tensor) -> Tensor:
    """Returns the values in a label map, ascending, int64 on the CPU."""
    if label.dtype == torch.uint8 and not label.is_cuda:  # a tenth of unique's time
        return torch.bincount(label.flatten(), minlength=256).nonzero().flatten()
    return label.unique().cpu().to(torch.int64)
