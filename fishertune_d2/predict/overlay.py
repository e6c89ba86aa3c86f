"""Pictures of a prediction: the image in the classes' colours, and the confidence.

Shapes: H, W: the image, in pixels.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fishertune_d2.data.labels import IGNORE_LABEL, LabelSpace
from fishertune_d2.evaluation.label_pictures import colorize, draw_legend

from .predictor import Prediction

_OPACITY = 0.5  # of a class's colour on the image
_TICKS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TITLE = "confidence"


def draw_prediction(
    image: np.ndarray,
    prediction: Prediction,
    space: LabelSpace,
    *,
    confidence: bool = False,
    legend: Sequence[int] | None = None,
) -> np.ndarray:
    """Draws the classes over the image, and their names below it.

    Args:
        image: (H, W, 3) uint8 RGB.
        prediction: the prediction of that image.
        space: names and colours of the classes.
        confidence: also draw the confidence on the right, with a scale from 0 to 1.
        legend: the classes to name; None names those in the prediction.

    Returns:
        uint8 RGB; the height is H and the legend's lines, the width W or twice W.
    """
    height, width = image.shape[:2]
    text = max(13, height // 36)
    classes = np.unique(prediction.classes).tolist() if legend is None else legend
    names = np.asarray(draw_legend(classes, space, width, text))
    columns = [(blend(image, prediction.classes, space), names)]
    if confidence:
        columns.append((_viridis(prediction.confidence), _draw_scale(width, text)))
    below = max(len(foot) for _, foot in columns)
    return np.hstack([np.vstack([panel, _padded(foot, below)]) for panel, foot in columns])


def blend(image: np.ndarray, classes: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Mixes the colours of (H, W) uint8 classes with an image, (H, W, 3) uint8 RGB.

    Returns:
        (H, W, 3) uint8 RGB; pixels of ``IGNORE_LABEL`` keep the image's colour.
    """
    colors = colorize(classes, space)
    mixed = cv2.addWeighted(colors, _OPACITY, image, 1 - _OPACITY, 0)
    return np.where((classes == IGNORE_LABEL)[..., None], image, mixed)


def _viridis(values: np.ndarray) -> np.ndarray:
    """Colours numbers from 0 to 1."""
    levels = (255 * values).round().astype(np.uint8)
    return cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_VIRIDIS), cv2.COLOR_BGR2RGB)


def _draw_scale(width: int, text: int) -> np.ndarray:
    """Draws the colours from 0 to 1, with numbers below."""
    font = ImageFont.load_default(size=text)
    gap, bar = text // 2, text
    left = right = text
    title = round(font.getlength(_TITLE))
    if width > 3 * title:  # there is room for the name beside the scale
        left += title + text
    ramp = np.linspace(0, 1, max(width - left - right, 1))
    picture = Image.new("RGB", (width, gap + bar + round(1.6 * text)), "white")
    picture.paste(Image.fromarray(_viridis(np.tile(ramp, (bar, 1)))), (left, gap))
    draw = ImageDraw.Draw(picture)
    if left > right:
        draw.text((gap, gap + bar / 2), _TITLE, fill="black", font=font, anchor="lm")
    for tick in _TICKS:
        x = left + tick * (len(ramp) - 1)
        draw.text((x, gap + bar + gap // 3), f"{tick:g}", fill="black", font=font, anchor="ma")
    return np.asarray(picture)


def _padded(foot: np.ndarray, height: int) -> np.ndarray:
    """Adds white rows below."""
    missing = height - len(foot)
    return np.pad(foot, ((0, missing), (0, 0), (0, 0)), constant_values=255)
