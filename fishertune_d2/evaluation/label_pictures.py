"""Draws image, label and prediction side by side, and the names of the colours."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from fishertune_d2.data.labels import IGNORE_LABEL, LabelSpace

_TEXT = 13  # size of the legend's names, in pixels
_MAX_HEIGHT = 512  # of a panel, in pixels; larger images are scaled down


def find_pictures(output_dir: str | Path, data_set: str) -> list[Path]:
    """Returns a data set's pictures in ``output_dir``, which an evaluator drew, in their order."""
    found = {}
    for path in (Path(output_dir) / "pictures").glob("*.png"):
        # A name's beginning is not enough: it may be another data set's whole name.
        match = re.fullmatch(re.escape(data_set) + r"_(\d+)", path.stem)
        if match:
            found[int(match[1])] = path
    return [found[k] for k in sorted(found)]


def colorize(labels: np.ndarray, space: LabelSpace) -> np.ndarray:
    """Returns (H, W) uint8 labels as (H, W, 3) uint8 colours of ``space``; ignored is black."""
    palette = np.zeros((256, 3), dtype=np.uint8)
    palette[: len(space.colors)] = space.colors
    return palette[labels]


def draw_comparison(
    image: np.ndarray, label: np.ndarray, prediction: np.ndarray, space: LabelSpace, path: Path
) -> None:
    """Writes image, label and prediction side by side, and a legend below them.

    Args:
        image: (H, W, 3) uint8 RGB.
        label: (H, W) uint8 classes of ``space``, or ``IGNORE_LABEL``.
        prediction: (H, W), as ``label``.
        space: Names and colours of the classes.
        path: The PNG to write; its folder is made.
    """
    panels = np.concatenate([image, colorize(label, space), colorize(prediction, space)], axis=1)
    shown = Image.fromarray(panels)
    if shown.height > _MAX_HEIGHT:
        width = round(shown.width * _MAX_HEIGHT / shown.height)
        # Nearest: a mixture of two classes' colours could be a third class's colour.
        shown = shown.resize((width, _MAX_HEIGHT), Image.Resampling.NEAREST)
    present = np.union1d(label, prediction)
    legend = draw_legend(present.tolist(), space, shown.width)
    picture = Image.new("RGB", (shown.width, shown.height + legend.height), "white")
    picture.paste(shown, (0, 0))
    picture.paste(legend, (0, shown.height))
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def draw_legend(
    classes: Sequence[int], space: LabelSpace, width: int, text: int = _TEXT
) -> Image.Image:
    """Returns a picture with a coloured square and a name for each class but ``IGNORE_LABEL``.

    The legend has as many lines as its ``width`` needs; ``text`` is the size of the names. Both are
    in pixels.
    """
    font = ImageFont.load_default(size=text)
    square, gap, line = text - 1, text // 3, round(1.5 * text)
    places, x, y = [], gap, 0
    for k in classes:
        if k == IGNORE_LABEL:
            continue
        step = round(font.getlength(space.classes[k])) + square + 5 * gap
        if x + step > width and x > gap:
            x, y = gap, y + line
        places.append((k, x, y))
        x += step
    legend = Image.new("RGB", (width, y + line), "white")
    draw = ImageDraw.Draw(legend)
    for k, x, y in places:
        middle = y + line / 2
        box = (x, middle - square / 2, x + square, middle + square / 2)
        draw.rectangle(box, fill=space.colors[k], outline="black")
        name = (x + square + gap, middle)
        draw.text(name, space.classes[k], fill="black", font=font, anchor="lm")
    return legend
