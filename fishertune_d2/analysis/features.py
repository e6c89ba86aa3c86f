"""Computes a segmentor's patch features of images, and draws them.

Shapes: D channels, (h, w) patches.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.data import SegmentationMapper, load_datasets
from fishertune_d2.modeling import VFMBackbone, VFMSegmentor


def read_images(cfg: CfgNode, name: str, count: int) -> list[dict]:
    """Reads test images, evenly spread over a data set.

    Args:
        cfg: INPUT and TEST are read.
        name: a registered data set.
        count: the number of images; a smaller data set gives all that it has.

    Returns:
        Inputs of the segmentor; ``image`` is (3, H, W) uint8.
    """
    items, mapper = load_datasets([name]), SegmentationMapper(cfg, is_train=False)
    chosen = np.linspace(0, len(items) - 1, min(count, len(items))).round().astype(int)
    return [mapper(items[i]) for i in chosen]


def blocks_of(backbone: VFMBackbone) -> nn.ModuleList:
    """Finds the blocks of a plain ViT, whose tokens are patches.

    Returns:
        The blocks, from shallow to deep.

    Raises:
        ValueError: if the backbone is a ConvNeXt.
    """
    if not hasattr(backbone.vit, "blocks"):
        raise ValueError(
            "features of patches and neurons are read from the blocks of a plain ViT, and this "
            f"backbone is a {type(backbone.vit).__name__}: choose a model with a ViT as "
            "MODEL.VFM.NAME"
        )
    return backbone.vit.blocks


def patch_features(
    model: VFMSegmentor, images: Sequence[dict], module: nn.Module | None = None
) -> list[Tensor]:
    """The output of a module of the backbone at each patch.

    Args:
        model: the segmentor.
        images: dicts with ``image`` (3, H, W), 0 .. 255; sizes may differ.
        module: the patch embedding or a block; by default the last block.

    Returns:
        Features of each image, (h, w, D), without class token and registers.
    """
    module = blocks_of(model.backbone)[-1] if module is None else module
    return features_of_modules(model, images, [module])[0]


@torch.no_grad()
def features_of_modules(
    model: VFMSegmentor, images: Sequence[dict], modules: Sequence[nn.Module]
) -> list[list[Tensor]]:
    """The result of :func:`patch_features` for each module, with one pass for each image."""
    backbone = model.backbone
    outputs: dict[int, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, inputs, output, k=k: outputs.update({k: output}))
        for k, module in enumerate(modules)
    ]
    maps: list[list[Tensor]] = [[] for _ in modules]
    try:
        for image in (item["image"].to(model.device) for item in images):
            backbone(((image - model.pixel_mean) / model.pixel_std)[None])
            height, width = (ceil(side / backbone.patch_size) for side in image.shape[-2:])
            for k, of_module in enumerate(maps):
                tokens = outputs.pop(k)[0]  # (N, D), prefix tokens first, or the embedding's map
                tokens = tokens.flatten(0, -2)[-height * width :]
                of_module.append(tokens.reshape(height, width, -1))
    finally:
        for hook in hooks:
            hook.remove()
    return maps


def pca_pictures(maps: Sequence[Tensor]) -> list[np.ndarray]:
    """The three directions in which features differ most, as red, green and blue.

    All maps share the directions, so that a colour has the same meaning in each picture.

    Args:
        maps: (h, w, D) each; h and w may differ.

    Returns:
        A picture for each map, (h, w, 3) float in 0..1. A direction's colour runs from its 1st to
        its 99th percentile. Its sign has no meaning.

    Raises:
        ValueError: if there are fewer than three patches or channels.
    """
    patches = torch.cat([features.flatten(0, 1) for features in maps]).double().cpu().numpy()
    if min(patches.shape) < 3:
        raise ValueError(
            f"{patches.shape[0]} patches of {patches.shape[1]} channels have no three directions: "
            "give at least 3 of each"
        )
    patches = patches - patches.mean(axis=0)
    directions = np.linalg.eigh(patches.T @ patches)[1][:, :-4:-1]  # of the largest variance
    values = patches @ directions
    low, high = np.percentile(values, [1, 99], axis=0)
    values = np.clip((values - low) / np.maximum(high - low, 1e-12), 0, 1)
    ends = np.cumsum([features.shape[0] * features.shape[1] for features in maps])[:-1]
    parts = np.split(values, ends)
    return [
        part.reshape(*features.shape[:2], 3) for part, features in zip(parts, maps, strict=True)
    ]
