"""The three regularisations of tqdm (Pak et al., ECCV 2024).

Shapes:
    B: images in the batch; C: classes; E: channels of CLIP's embeddings
    H, W: the padded images, in pixels; h, w: patches
"""

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.07  # of the loss between pixels and text


def language_loss(text: Tensor, anchors: Tensor) -> Tensor:
    """Keeps each class nearest to its own fixed prompt.

    Args:
        text: (B, C, E).
        anchors: (C, E), of the fixed prompts.

    Returns:
        The cross entropy of the cosines without temperature: mean over images and classes.
    """
    cosines = F.normalize(text, dim=-1) @ F.normalize(anchors, dim=-1).T  # (B, C, C)
    own = torch.arange(len(anchors), device=text.device).expand(len(text), -1)
    return F.cross_entropy(cosines.flatten(0, 1), own.flatten())


def vision_loss(image: Tensor, public: Tensor) -> Tensor:
    """Keeps the image's embedding near that of the public weights; both are (B, E).

    Returns:
        The squared difference: mean over images and channels.
    """
    return F.mse_loss(image, public)


def vision_language_loss(
    patches: Tensor, text: Tensor, labels: Tensor, ignore_value: int
) -> Tensor:
    """Classifies each pixel by the text that is nearest to its patch.

    Args:
        patches: (B, E, h, w).
        text: (B, C, E).
        labels: the class of each pixel, (B, H, W) of any integer type.
        ignore_value: the label of pixels that do not count.

    Returns:
        The cross entropy of the cosines over ``TEMPERATURE``, resized bilinearly to the labels:
        mean over labelled pixels, 0 if there are none.
    """
    cosines = torch.einsum("beij,bce->bcij", F.normalize(patches, dim=1), F.normalize(text, dim=-1))
    logits = F.interpolate(
        cosines / TEMPERATURE, labels.shape[-2:], mode="bilinear", align_corners=False
    )
    total = F.cross_entropy(logits, labels.long(), ignore_index=ignore_value, reduction="sum")
    return total / (labels != ignore_value).sum().clamp(min=1)
