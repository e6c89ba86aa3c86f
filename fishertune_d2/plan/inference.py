"""What it takes to score an image of each test set."""

from dataclasses import dataclass

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.modeling.sliding import window_starts

from .flops import Flops, InferencePass, count_flops
from .imagined import padded_size


@dataclass(frozen=True)
class Inference:
    """What it takes to score an image.

    Attributes:
        names: the test sets whose images have this size, or at most this size.
        size: (height, width) in pixels; None where only the data will tell.
        window: (height, width) of what passes through the model at once.
        windows: how many of them make an image; 1 where its size is not known.
        flops: of one window.
    """

    names: tuple[str, ...]
    size: tuple[int, int] | None
    window: tuple[int, int]
    windows: int
    flops: Flops


def plan_inference(cfg: CfgNode, model: nn.Module, unknown: tuple[int, int]) -> list[Inference]:
    """Counts a pass for each size of the images of DATASETS.TEST.

    Args:
        cfg: DATASETS.TEST and TEST are read.
        model: an imagined one on the meta device; comes back in training mode.
        unknown: (height, width) to count for an image in one piece whose size is not known.
    """
    by_size: dict[tuple[int, int] | None, list[str]] = {}
    for name in cfg.DATASETS.TEST:
        by_size.setdefault(_size(cfg, name), []).append(name)
    model.eval()
    planned, counted = [], {}
    for size, names in by_size.items():
        window, windows = size or unknown, 1
        if cfg.TEST.MODE == "slide":
            window, windows = tuple(cfg.TEST.CROP_SIZE), 1
            if size is not None:
                axes = list(zip(size, window, cfg.TEST.STRIDE, strict=True))
                windows = len(window_starts(*axes[0])) * len(window_starts(*axes[1]))
                window = tuple(min(side, most) for side, most, _ in axes)
        if window not in counted:
            counted[window] = _count(model, window)
        planned.append(Inference(tuple(names), size, window, windows, counted[window]))
    model.train()
    return planned


def _size(cfg: CfgNode, name: str) -> tuple[int, int] | None:
    """(height, width) that images of a data set are tested at, or at most; None if not known."""
    row = next((row for row in DATASETS if row.name == name), None)
    sizes = {chosen: (width, height) for chosen, width, height in cfg.TEST.SIZES}
    size = sizes.get(name, row and row.test_size)
    if size is None and row is not None and row.published is not None:
        size = max(row.published.sizes, default=None)
    return None if size is None else (size[1], size[0])


@torch.no_grad()
def _count(model: nn.Module, window: tuple[int, int]) -> Flops:
    images = torch.empty(1, 3, *padded_size(model, window), device="meta")
    return count_flops(InferencePass(model), [images])
