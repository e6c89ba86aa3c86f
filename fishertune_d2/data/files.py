"""Reading image and label files, with errors that name the file and the remedy."""

import struct
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from fishertune_d2.data.labels import FIRST_CHANNEL_MAPS, LABEL_MAPS, UNKNOWN_ID

# What PIL raises on missing, truncated, empty or foreign files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# One channel of ids: binary, grey, palette (the indices, not their colours), 16 and 32 bit.
_LABEL_MODES = ("1", "L", "P", "I", "I;16")
# The first 16 bytes of every PNG; width and height follow, 4 bytes each.
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"


class DatasetError(RuntimeError):
    """Data that cannot be used as they are; the message names the file and the remedy."""


def load_image(path: str | Path, *, upright: bool = False) -> Image.Image:
    """Decodes an image as it is stored, or upright.

    By Pillow: OpenCV is 7 % faster (docs/results/data_loading.md), but returns a JPEG that ends too
    early without an error.

    Args:
        path: the file.
        upright: turn the image as its orientation tag says. Not where it has a label: label files
            carry no tag, and fit the stored pixels.

    Returns:
        A Pillow image of mode RGB, which can be resized without a detour over an array.

    Raises:
        DatasetError: if the file cannot be read to its end.
    """
    try:
        with Image.open(path) as image:
            image.load()  # reads to the end and closes the file
            shown = ImageOps.exif_transpose(image) if upright else image
            return shown if shown.mode == "RGB" else shown.convert("RGB")
    except _BROKEN as error:
        raise _unreadable(path, error) from error


def to_array(image: Image.Image, image_format: str = "RGB") -> np.ndarray:
    """Copies the pixels of an RGB image of Pillow's.

    Args:
        image: of mode RGB.
        image_format: order of the channels, "RGB" or "BGR".

    Returns:
        (H, W, 3) uint8.
    """
    pixels = np.asarray(image)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def read_image(path: str | Path, image_format: str = "RGB", *, upright: bool = False) -> np.ndarray:
    """Reads an image into an array; see `load_image`, which also says when it raises.

    Args:
        path: the file.
        image_format: order of the channels, "RGB" or "BGR".
        upright: turn the image as its orientation tag says.

    Returns:
        (H, W, 3) uint8.
    """
    return to_array(load_image(path, upright=upright), image_format)


def read_label(path: str | Path, label_map: str, halve: bool = False) -> np.ndarray:
    """Reads a label file and maps its ids to train ids.

    Args:
        path: the file, one channel of ids; where the map is in `FIRST_CHANNEL_MAPS` maybe more.
        label_map: a name in `LABEL_MAPS`.
        halve: returns half the height and width, rounded down, by nearest neighbours: the same
            pixels as Pillow's. Ids of the pixels left out are not looked at.

    Returns:
        (H, W) uint8 train ids, 255 where ignored.

    Raises:
        DatasetError: if the file cannot be read, has colour channels, or holds an id that its map
            does not know.
    """
    read = _read_first_channel if label_map in FIRST_CHANNEL_MAPS else _read_only_channel
    ids = read(path)
    if halve:
        ids = ids[1::2, 1::2]
    if ids.dtype != np.uint8:
        ids = ids.astype(np.int64)
        beyond = (ids < 0) | (ids > 255)
        if beyond.any():
            raise _unknown_ids(path, ids[beyond], label_map)
        ids = ids.astype(np.uint8)
    table = LABEL_MAPS[label_map]
    # OpenCV's table takes a quarter of the time that numpy's indexing takes.
    unknown = cv2.LUT(ids, (table == UNKNOWN_ID).astype(np.uint8))
    if unknown.any():
        raise _unknown_ids(path, ids[unknown > 0], label_map)
    return cv2.LUT(ids, table.astype(np.uint8))


def _read_only_channel(path: str | Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            mode, ids = image.mode, np.asarray(image)
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    if mode not in _LABEL_MODES:
        raise DatasetError(
            f"{path}: a label file holds one channel of class ids, this one has PIL mode {mode}. "
            "Save the ids as a grey or palette PNG; if these are colours, look for the file with "
            "the ids beside it."
        )
    return ids


def _read_first_channel(path: str | Path) -> np.ndarray:
    """Reads with OpenCV: Pillow cuts 16-bit colour channels down to their upper 8 bits."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if pixels is None:
        raise _unreadable(path, OSError("OpenCV finds no complete image"))
    return pixels if pixels.ndim == 2 else pixels[:, :, 2]  # blue, green, red


def image_size(path: str | Path) -> tuple[int, int]:
    """Reads (height, width) from the header alone.

    Raises:
        DatasetError: if the header cannot be read.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(24)
            if len(start) == 24 and start.startswith(_PNG_START):  # a fifth of Pillow's time
                width, height = struct.unpack(">II", start[16:])
                return height, width
            file.seek(0)
            with Image.open(file) as image:
                width, height = image.size
    except _BROKEN as error:
        raise _unreadable(path, error) from error
    return height, width


def _unreadable(path: str | Path, error: Exception) -> DatasetError:
    return DatasetError(
        f"{path}: cannot be read ({type(error).__name__}: {error}). Copy or download it again."
    )


def _unknown_ids(path: str | Path, ids: np.ndarray, label_map: str) -> DatasetError:
    known = np.flatnonzero(LABEL_MAPS[label_map] != UNKNOWN_ID).tolist()
    return DatasetError(
        f"{path}: label {int(ids[0])} is out of range ({ids.size} pixels with such values); the "
        f"label map {label_map!r} knows {_ranges(known)}. Restore the file as its authors ship "
        "it, or register the data set with the map that fits its ids."
    )


def _ranges(values: list[int]) -> str:
    """Writes sorted integers as ranges: [0, 1, 2, 255] is "0-2, 255"."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][1] + 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
