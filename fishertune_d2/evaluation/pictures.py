"""Side-by-side pictures: image, label, prediction, and the names of the colours."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fishertune_d2.data.labels import IGNORE_LABEL, LabelSpace

_LINE = 20  # height of a line of the legend, in pixels
_MAX_HEIGHT = 512  # of a panel; larger images are scaled down


def colorize(labels: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Colours classes; ignored pixels are black.

    Args:
        labels: (H, W) uint8 classes of ``space``, or ``IGNORE_LABEL``.
        space: lends the colours.

    Returns:
        (H, W, 3) uint8.
    """
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(space.colors)] = space.colors
    return palette[labels]


def draw_comparison(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, space: LabelSpace, path: Path
) -> None:
    """Writes image, label and prediction side by side, and below them a legend.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 classes of ``space``, or ``IGNORE_LABEL``.
        prediction: (H, W), as ``label``.
        space: names and colours of the classes.
        path: the PNG to write; its folder is made.
    """
    panels = np.concatenate([image, colorize(label, space), colorize(prediction, space)], axis=1)
    shown = Image.fromarray(panels)
    if shown.height > _MAX_HEIGHT:
        width = round(shown.width * _MAX_HEIGHT / shown.height)
        # Nearest: a mixture of two classes' colours could be the colour of a third.
        shown = shown.resize((width, _MAX_HEIGHT), Image.Resampling.NEAREST)
    present = np.union1d(label, prediction)
    legend = _legend([k for k in present.tolist() if k != IGNORE_LABEL], space, shown.width)
    picture = Image.new("RGB", (shown.width, shown.height + legend.height), "white")
    picture.paste(shown, (0, 0))
    picture.paste(legend, (0, shown.height))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def _legend(classes: list[int], space: LabelSpace, width: int) -> Image.Image:
    """Draws a coloured square and a name for each class, in as many lines as needed."""
    font = ImageFont.load_default(size=13)
    places, x, y = [], 4, 0
    for k in classes:
        step = int(font.getlength(space.classes[k])) + 32
        if x + step > width and x > 4:
            x, y = 4, y + _LINE
        places.append((k, x, y))
        x += step
    legend = Image.new("RGB", (width, y + _LINE), "white")
    draw = ImageDraw.Draw(legend)
    for k, x, y in places:
        draw.rectangle((x, y + 4, x + 12, y + 16), fill=space.colors[k], outline="black")
        draw.text((x + 17, y + 2), space.classes[k], fill="black", font=font)
    return legend
