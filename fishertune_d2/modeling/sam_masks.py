"""Refines pseudo-labels by SAM's masks (Kirillov et al., ICCV 2023), as CLOUDS does.

Shapes: (H, W) pixels; P regions; N points in a region; 3 masks that SAM proposes for a region.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import label as connected_components
from torch import Tensor

# The regions that are refined, in pixels, and the points at which SAM is asked in each (CLOUDS).
LEAST_PIXELS = 5000
POINTS = 5


class Proposals(NamedTuple):
    """What SAM proposes for P regions.

    Attributes:
        masks: (P, 3, H, W) bool.
        quality: the IoU that SAM predicts for each, (P, 3).
    """

    masks: np.ndarray
    quality: np.ndarray


def refine(
    label: np.ndarray,
    predict: Callable[[np.ndarray], Proposals],
    generator: np.random.Generator,
    ignore_value: int = 255,
    least_pixels: int = LEAST_PIXELS,
) -> np.ndarray:
    """Replaces the large regions of each class by SAM's masks.

    A region is a connected part of a class with more than ``least_pixels``. SAM gets five random
    points of each, and its mask of the best predicted IoU counts. Pixels in no mask, or in more
    than one, are ignored. A label without such a region stays as it is.

    Args:
        label: (H, W) uint8, the class of each pixel.
        predict: from points (P, N, 2), x before y, in pixels, to SAM's proposals.
        generator: draws the points.
        ignore_value: the label of ignored pixels.
        least_pixels: the size that a region must exceed.

    Returns:
        (H, W) uint8.
    """
    classes, points = [], []
    for number in np.unique(label[label != ignore_value]):
        parts, count = connected_components(label == number)
        sizes = np.bincount(parts.ravel(), minlength=count + 1)
        for part in range(1, count + 1):
            if sizes[part] > least_pixels:
                rows, columns = np.nonzero(parts == part)
                chosen = generator.choice(len(rows), POINTS, replace=False)
                points.append(np.stack([columns[chosen], rows[chosen]], axis=-1))
                classes.append(number)
    if not points:
        return label
    proposals = predict(np.stack(points))
    best = proposals.quality.argmax(1)
    masks = proposals.masks[np.arange(len(best)), best]  # (P, H, W)
    refined = np.full_like(label, ignore_value)
    for number, mask in zip(classes, masks, strict=True):
        refined[mask] = number
    refined[masks.sum(0) > 1] = ignore_value
    return refined


def load_sam(
    name: str, device: str, image_format: str = "RGB"
) -> Callable[[Tensor, np.ndarray], Proposals]:
    """Loads a SAM of transformers.

    Args:
        name: a folder, or an id of the hub, such as ``facebook/sam-vit-huge``.
        device: the device that computes.
        image_format: "RGB" or "BGR", the order of the images' channels.

    Returns:
        A function from an image (3, H, W), 0 .. 255, and points (P, N, 2) to proposals.

    Raises:
        ValueError: if there is no such model.
    """
    from transformers import SamModel, SamProcessor  # slow to import

    try:
        model, processor = SamModel.from_pretrained(name), SamProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"SELF_TRAINING.SAM is {name!r}, and transformers cannot load it: {error}. Name the "
            "folder of a SAM that was downloaded, or an id such as facebook/sam-vit-huge; or leave "
            "the key empty"
        ) from error
    model = model.eval().requires_grad_(False).to(device)

    @torch.no_grad()
    def predict(image: Tensor, points: np.ndarray) -> Proposals:
        pixels = image.permute(1, 2, 0).numpy()
        pixels = pixels[..., ::-1] if image_format == "BGR" else pixels
        inputs = processor(
            np.ascontiguousarray(pixels), input_points=[points.tolist()], return_tensors="pt"
        )
        found = model(
            pixel_values=inputs["pixel_values"].to(device),
            input_points=inputs["input_points"].to(device, torch.float32),
            multimask_output=True,
        )
        (masks,) = processor.image_processor.post_process_masks(
            found.pred_masks.cpu(), inputs["original_sizes"], inputs["reshaped_input_sizes"]
        )
        return Proposals(masks.numpy().astype(bool), found.iou_scores[0].cpu().numpy())

    return predict
