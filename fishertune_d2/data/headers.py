"""Reads sizes and orientations of image files from their headers alone.

A camera stores its pixels unturned, with a tag that says how to turn them. Here, as in viewers and
in Detectron2, the size of an image is its upright size.
"""

import os
import struct
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

# Turns the stored pixels upright, keyed by the tag's value. 1 and unknown values turn nothing.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The first 16 bytes of every PNG; width and height follow, 4 bytes each.
_PNG_START = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR"
_PNG_FIRST_CHUNK = 33
# Pillow, too, looks for the tag in PNG text chunks that begin so.
_TEXTS = (b"Raw profile type exif", b"XML:com.adobe.xmp")
# Attempts to jump to the end of a PNG's pixels before reading chunk by chunk.
_TRIES = 16


class Header(NamedTuple):
    """An image's upright height and width in pixels, and EXIF's orientation; 1 turns nothing."""

    height: int
    width: int
    orientation: int

    @property
    def size(self) -> tuple[int, int]:
        """(height, width), upright."""
        return self.height, self.width


def read_header(path: str | Path) -> Header:
    """Reads size and orientation; passes on Pillow's errors on files that it cannot read."""
    with open(path, "rb") as file:
        start = os.pread(file.fileno(), 24, 0)
        if len(start) == 24 and start.startswith(_PNG_START) and not _may_be_turned(file.fileno()):
            width, height = struct.unpack(">II", start[16:])  # much faster than Pillow
            return Header(height, width, 1)
        with Image.open(file) as image:
            turn = orientation(image)
            width, height = image.size
            if turn > 4 and image.format != "TIFF":  # Pillow has turned a TIFF's size already
                width, height = height, width
            return Header(height, width, turn)


def orientation(image: Image.Image) -> int:
    """Returns an image's orientation tag, 1 to 8; 1 if it has none, or a broken one."""
    try:
        tag = image.getexif().get(ExifTags.Base.Orientation)
    # Pillow raises various errors on broken metadata. Detectron2 ignores them, too.
    except Exception:
        return 1
    return tag if tag in TURNS else 1


def _may_be_turned(png: int) -> bool:
    """Whether a PNG, given by its file descriptor, has a chunk that can hold an orientation tag."""
    # The chunk may follow the pixels, whose chunks, hundreds in a large file, are jumped over: all
    # but the last have the same length.
    position, end = _PNG_FIRST_CHUNK, os.fstat(png).st_size
    while True:
        start = os.pread(png, 8 + len(_TEXTS[0]), position)
        kind = start[4:8]
        if kind == b"eXIf" or (
            kind in (b"tEXt", b"zTXt", b"iTXt") and start[8:].startswith(_TEXTS)
        ):
            return True
        if len(start) < 8 or kind == b"IEND":
            return False
        step = 12 + int.from_bytes(start[:4], "big")
        if kind == b"IDAT":
            most = (end - position) // step
            for count in range(most, max(most - _TRIES, 0), -1):
                if os.pread(png, 4, position + count * step + 4) == b"IDAT":
                    step *= count
                    break
        position += step
