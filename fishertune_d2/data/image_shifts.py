"""Shifts of real photographs: dev sets for a search that must not see the target domains.

They are simple on purpose. A search needs images that differ from the source as night and fog do;
it does not need images that pass for photographs of them.
"""

import zlib
from collections.abc import Callable

import cv2
import numpy as np

# An RGB image (H, W, 3) uint8 and a random generator -> the shifted image, of the same kind.
Shift = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def fog(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blends distant parts into grey air, by Koschmieder's law I = J t + A (1 - t)."""
    # The distance is not known. It is taken to rise from the bottom of the image to the horizon,
    # which lies at 45 % of the height, and to vary in large patches.
    height, width = image.shape[:2]
    rows = np.linspace(0, 1, height, dtype=np.float32)[:, None]
    distance = np.clip((1 - rows) / 0.55, 0, 1) ** 2
    patches = cv2.resize(
        rng.random((4, 8), np.float32), (width, height), interpolation=cv2.INTER_CUBIC
    )
    density = rng.uniform(1.5, 3.0) * (0.7 + 0.6 * patches)
    transmission = np.exp(-density * distance)[..., None]
    air = 255 * rng.uniform(0.75, 0.9)
    return _as_uint8(image * transmission + air * (1 - transmission))


def night(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Darkens an image, shadows most, tints it blue, and adds the noise of a sensor."""
    light = (image / np.float32(255)) ** np.float32(rng.uniform(1.2, 1.8))
    tint = np.array([0.8, 0.9, 1.1], np.float32) * np.float32(rng.uniform(0.4, 0.7))
    noise = rng.normal(0, rng.uniform(3, 8), image.shape).astype(np.float32)
    return _as_uint8(255 * light * tint + noise)


def blur(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blurs an image as drops on a lens or a wrong focus do, relative to its height."""
    deviation = rng.uniform(1.5, 3.0) * image.shape[0] / 1024
    return cv2.GaussianBlur(image, (0, 0), sigmaX=max(deviation, 0.3))


SHIFTS: dict[str, Shift] = {"fog": fog, "night": night, "blur": blur}


def mixed(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Shifts an image in one of the ways of `SHIFTS`, drawn at random."""
    return SHIFTS[rng.choice(list(SHIFTS))](image, rng)


def shift_image(image: np.ndarray, name: str, file_name: str) -> np.ndarray:
    """Shifts an image, the same way at every call for the same file.

    Args:
        image: RGB, (H, W, 3) uint8.
        name: a key of `SHIFTS`.
        file_name: the image's file; its last part seeds the random numbers.

    Returns:
        The shifted image, (H, W, 3) uint8.
    """
    words = f"{name} {file_name.rpartition('/')[2]}"
    return SHIFTS[name](image, np.random.default_rng(zlib.crc32(words.encode())))


def _as_uint8(image: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(image), 0, 255).astype(np.uint8)
