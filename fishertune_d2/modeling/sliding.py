"""Sliding windows over an image, averaged where they overlap.

Shapes:
    C: classes; H, W: the image, in pixels; N: windows in a batch
"""

from collections.abc import Callable

import torch


def window_starts(length: int, window: int, stride: int) -> list[int]:
    """Returns the first pixels of windows along one axis; the last window ends at the border."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def sliding_average(
    predict: Callable[[torch.Tensor], torch.Tensor],
    image: torch.Tensor,
    window: tuple[int, int],
    stride: tuple[int, int],
    batch: int = 1,
) -> torch.Tensor:
    """Predicts windows in batches and averages the scores of each pixel.

    Args:
        predict: computes the scores (N, C, h, w) of windows (N, 3, h, w).
        image: (3, H, W).
        window: height and width of a window; a smaller image is one window.
        stride: pixels between windows, vertically and horizontally.
        batch: N; the last batch may be smaller.

    Returns:
        (C, H, W), of the scores' type.
    """
    height, width = image.shape[-2:]
    total: torch.Tensor | None = None
    count = image.new_zeros(height, width)
    places = [
        (..., slice(top, top + window[0]), slice(left, left + window[1]))
        for top in window_starts(height, window[0], stride[0])
        for left in window_starts(width, window[1], stride[1])
    ]
    for first in range(0, len(places), batch):
        chosen = places[first : first + batch]
        scores = predict(torch.stack([image[place] for place in chosen]))
        if total is None:
            total = scores.new_zeros(scores.shape[1], height, width)
        for place, of_window in zip(chosen, scores, strict=True):
            total[place] += of_window
            count[place] += 1
    assert total is not None  # there is at least one window
    return total / count
