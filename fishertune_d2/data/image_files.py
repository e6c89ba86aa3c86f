"""Reads image and label files, with errors that name the file and the remedy.

Both are read upright, as Detectron2 does: an orientation tag, if there is one, turns them.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from fishertune_d2.data.headers import TURNS, Header, orientation, read_header
from fishertune_d2.data.labels import FIRST_CHANNEL_MAPS, LABEL_MAPS, UNKNOWN_ID

# Pillow raises these on missing, truncated, empty or foreign files.
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)
# One channel of ids: binary, grey, palette (the indices, not their colours), 16 and 32 bit.
_LABEL_MODES = ("1", "L", "P", "I", "I;16", "I;16B")
# Pillow stretches grey values of 2 and 4 bits to 0..255.
_STRETCHED = {"L;2": 85, "L;2R": 85, "L;4": 17, "L;4R": 17}
# A file in one of these formats may have been saved with losses.
_LOSSY = ("JPEG", "MPO", "JPEG2000", "WEBP", "AVIF")
_LOSSY_IN_TIFF = ("jpeg", "tiff_jpeg", "webp")
# Pillow's modes of one channel for which no value is known to be white.
_UNSCALED = {"F": "floats", "I": "32-bit integers", "I;16": "16-bit grey", "I;16B": "16-bit grey"}


class DatasetError(ValueError):
    """Data that cannot be used; the message names the file and the remedy."""


def load_image(path: str | Path) -> Image.Image:
    """Decodes an image, upright, into three channels of 8 bits.

    Pillow decodes: OpenCV is 7 % faster (docs/results/data_loading.md), but returns a truncated
    JPEG without an error. As in Detectron2, transparency is dropped, 16-bit colours keep their
    upper 8 bits, and only the first of several frames counts. Grey values of more than 8 bits and
    floats are refused: a file does not say which value is white, and a wrong guess gives black
    images.

    Returns:
        A Pillow image of mode RGB, which can be resized without becoming an array first.

    Raises:
        DatasetError: if the file cannot be read to its end, or its values have no known scale.
    """
    try:
        with _opened(path) as image:
            image.load()  # reads to the end
            if image.mode in _UNSCALED:
                raise DatasetError(_unscaled(path, image))
            image = _turned(image)
            return image if image.mode == "RGB" else image.convert("RGB")
    except _BROKEN as error:
        raise DatasetError(_unreadable(path, error)) from error


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    """Opens an image from an open file: given a path, Pillow maps TIFFs and garbles turned ones."""
    with open(path, "rb") as file, Image.open(file) as image:
        yield image


def _turned(image: Image.Image) -> Image.Image:
    """Turns an image upright; Pillow itself turns TIFF files when it loads them."""
    turn = TURNS.get(orientation(image))
    return image if turn is None else image.transpose(turn)


def to_array(image: Image.Image, image_format: str = "RGB") -> np.ndarray:
    """Returns the (H, W, 3) uint8 pixels of an RGB image in the order "RGB" or "BGR"."""
    pixels = np.asarray(image)
    return pixels[:, :, ::-1] if image_format == "BGR" else pixels


def read_image(path: str | Path, image_format: str = "RGB") -> np.ndarray:
    """Reads an image by `load_image` as (H, W, 3) uint8 in the order "RGB" or "BGR"."""
    return to_array(load_image(path), image_format)


def read_label(path: str | Path, label_map: str, halve: bool = False) -> np.ndarray:
    """Reads a label file and maps its ids to train ids.

    Args:
        path: The file, one channel of ids; a map in `FIRST_CHANNEL_MAPS` allows more.
        label_map: A name in `LABEL_MAPS`.
        halve: Returns half the height and width, rounded down, by nearest neighbours: the same
            pixels as Pillow's. Ids of the other pixels are not checked.

    Returns:
        (H, W) uint8 train ids, 255 where ignored; upright.

    Raises:
        DatasetError: if the file cannot be read, has colour channels, does not hold the ids as
            they were drawn (JPEG, JPEG 2000, ...), or holds an id that its map does not know.
    """
    ids = _read_ids(path, first_channel=label_map in FIRST_CHANNEL_MAPS)
    if halve:
        ids = ids[1::2, 1::2]
    if ids.dtype != np.uint8:
        ids = ids.astype(np.int64)
        beyond = (ids < 0) | (ids > 255)
        if beyond.any():
            raise DatasetError(_unknown_ids(path, ids[beyond], label_map))
        ids = ids.astype(np.uint8)
    table = LABEL_MAPS[label_map]
    # OpenCV's table takes a quarter of the time that numpy's indexing takes.
    unknown = cv2.LUT(ids, (table == UNKNOWN_ID).astype(np.uint8))
    if unknown.any():
        raise DatasetError(_unknown_ids(path, ids[unknown > 0], label_map))
    return cv2.LUT(ids, table.astype(np.uint8))


def _read_ids(path: str | Path, first_channel: bool) -> np.ndarray:
    """Reads the stored ids, upright, as (H, W) of any integer type or bool."""
    try:
        with _opened(path) as image:
            lossy = _lossy(image)
            if lossy:
                image.load()
                raise DatasetError(
                    f"{path}: a JPEG does not keep the ids that were saved, and this file "
                    f"({lossy}) may not keep them either: its compression changes ids near edges. "
                    "Save the ids as a PNG, from the program in which they were drawn."
                )
            if image.mode not in _LABEL_MODES:
                if first_channel:
                    return _read_first_channel(path)
                raise DatasetError(
                    f"{path}: a label file holds one channel of class ids, this one has PIL mode "
                    f"{image.mode}. Save the ids as a grey or palette PNG; if these are colours, "
                    "look for the file with the ids beside it."
                )
            tiles = getattr(image, "tile", ())  # only files have them
            codec, _, _, packing = tiles[0] if tiles else ("", None, 0, "")
            packing, *more = (packing,) if isinstance(packing, str) else packing
            image.load()  # empties image.tile
            if re.fullmatch(r"[1L];[24]?IR?", str(packing)):
                why = (
                    "in a PBM file 1 is black and 0 is white"
                    if image.format == "PPM"
                    else "this TIFF says that 0 is white"
                )
                raise DatasetError(
                    f"{path}: {why}, so it is not clear whether ids count from 0 upwards or from "
                    "the largest downwards. Save the ids as a grey PNG."
                )
            white = 255 if image.mode == "L" else 65535
            ids = np.asarray(_turned(image))
    except _BROKEN as error:
        raise DatasetError(_unreadable(path, error)) from error
    if codec in ("ppm", "ppm_plain"):  # Pillow scaled a PGM's largest value to the type's largest
        return np.rint(ids * (more[0] / white)).astype(np.int64)
    return ids // _STRETCHED[packing] if packing in _STRETCHED else ids


def _lossy(image: Image.Image) -> str | None:
    """Returns the name of a format or compression that may have changed ids, else None."""
    if image.format == "TIFF" and image.info.get("compression") in _LOSSY_IN_TIFF:
        return f"a TIFF compressed as {image.info['compression']}"
    return image.format if image.format in _LOSSY else None


def _read_first_channel(path: str | Path) -> np.ndarray:
    """Reads with OpenCV, because Pillow keeps only the upper 8 bits of 16-bit colour channels."""
    pixels = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)  # OpenCV does not turn them
    if pixels is None:
        raise OSError("OpenCV finds no complete image")
    ids = np.ascontiguousarray(pixels[:, :, 2])  # blue, green, red
    turn = TURNS.get(read_header(path).orientation)
    return ids if turn is None else np.asarray(Image.fromarray(ids).transpose(turn))


def image_header(path: str | Path) -> Header:
    """Reads the upright size and the orientation from the header alone."""
    try:
        return read_header(path)
    except _BROKEN as error:
        raise DatasetError(_unreadable(path, error)) from error


def size_remedy(image: str | Path, label: str | Path) -> str:
    """Returns the remedy for an image and a label of unequal sizes."""
    rule = "An image and its label must have the same size"
    turned = [
        f"the pixels of {path} are stored as {header.height}x{header.width}, and an orientation "
        f"tag turns them into {header.width}x{header.height}"
        for path in (image, label)
        if (header := image_header(path)).orientation > 4
    ]
    if not turned:
        return f"{rule}; download or export the pair again."
    return (
        f"{rule} when both are upright, as viewers show them and Detectron2 reads them: "
        f"{'; '.join(turned)}. Draw the labels on the upright images; or, if they were drawn on "
        "the pixels as they are stored, remove the tags: "
        f"exiftool -Orientation= -overwrite_original -r '{Path(image).parent}'."
    )


def _unscaled(path: str | Path, image: Image.Image) -> str:
    pixels = np.asarray(image)
    low, high = pixels.min(), pixels.max()
    return (
        f"{path}: its pixels are {_UNSCALED[image.mode]} from {low:g} to {high:g}, and the file "
        "does not say which value is white. Save images of 8 bits, all with the same white: "
        "cv2.imwrite(new, cv2.convertScaleAbs(cv2.imread(old, cv2.IMREAD_UNCHANGED), "
        "alpha=255 / white))."
    )


def _unreadable(path: str | Path, error: Exception) -> str:
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"{path}: has too many pixels ({error}). Cut it into tiles, or raise Pillow's limit, "
            "PIL.Image.MAX_IMAGE_PIXELS, in the script that starts the run."
        )
    return f"{path}: cannot be read ({type(error).__name__}: {error}). Copy or download it again."


def _unknown_ids(path: str | Path, ids: np.ndarray, label_map: str) -> str:
    known = np.flatnonzero(LABEL_MAPS[label_map] != UNKNOWN_ID).tolist()
    return (
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
