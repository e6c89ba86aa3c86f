"""FLOPs of scoring an image of each test set."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

import torch
from detectron2.config import CfgNode
from torch import Tensor

from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.protocols import Protocol, Size
from fishertune_d2.modeling.segmentor import VFMSegmentor
from fishertune_d2.modeling.sliding import window_starts

from .fake_model import padded_size
from .flops import Flops, count_flops


@dataclass(frozen=True)
class Inference:
    """The cost of scoring one image."""

    names: tuple[str, ...]  # the test sets whose images have this size, or at most this size
    size: tuple[int, int] | None  # (height, width) in pixels; None where only the data will tell
    window: tuple[int, int]  # (height, width) of the part that passes through the model at once
    windows: int  # how many windows make an image; 1 where its size is not known
    flops: Flops  # of one window


def plan_inference(cfg: CfgNode, model: VFMSegmentor, unknown: tuple[int, int]) -> list[Inference]:
    """Counts a pass for each size of the images of DATASETS.TEST.

    Args:
        cfg: DATASETS.TEST and TEST are read.
        model: a model without values on the meta device; it stays in evaluation mode.
        unknown: (height, width) to count for a whole image whose size is not known.

    Returns:
        One entry for each size.
    """
    chosen = Protocol.from_config(cfg).sizes_of(cfg.DATASETS.TEST)
    by_size: dict[tuple[int, int] | None, list[str]] = {}
    for name in cfg.DATASETS.TEST:
        by_size.setdefault(_size(name, chosen), []).append(name)
    model.eval()
    planned = []
    counted: dict[tuple[int, int], Flops] = {}
    for size, names in by_size.items():
        window, windows = size or unknown, 1
        if cfg.TEST.MODE == "slide":
            window = tuple(cfg.TEST.CROP_SIZE)
            if size is not None:
                axes = list(zip(size, window, cfg.TEST.STRIDE, strict=True))
                windows = prod(len(window_starts(*axis)) for axis in axes)
                window = min(size[0], window[0]), min(size[1], window[1])
        if window not in counted:
            counted[window] = _count(model, window)
        planned.append(Inference(tuple(names), size, window, windows, counted[window]))
    return planned


def _size(name: str, chosen: Mapping[str, Size | None]) -> tuple[int, int] | None:
    """(height, width) that images of a data set are tested at, or at most; None if not known."""
    data_set = next((each for each in DATASETS if each.name == name), None)
    size = chosen.get(name, data_set.test_size if data_set else None)
    if size is None and data_set is not None and data_set.published is not None:
        size = max(data_set.published.sizes, default=None)
    return (size[1], size[0]) if size else None


@torch.no_grad()
def _count(model: VFMSegmentor, window: tuple[int, int]) -> Flops:
    padded = padded_size(model, window)
    images = torch.empty(1, 3, *padded, device="meta")

    def scores() -> Tensor:
        found = model.head(model.backbone(images), image_size=padded)[0]
        assert found is not None  # a head without targets computes scores
        return found

    return count_flops(scores)
