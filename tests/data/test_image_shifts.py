"""Shifts of photographs: seeded by the file, and in the direction that their names say."""

import numpy as np
import pytest

from fishertune_d2.data.image_shifts import SHIFTS, shift_image


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (512, 96, 3), np.uint8)


@pytest.mark.parametrize("name", SHIFTS)
def test_the_file_alone_decides_the_random_numbers(name, image):
    first = shift_image(image, name, "/one/place/a.png")
    assert first.dtype == np.uint8 and first.shape == image.shape
    assert (first == shift_image(image, name, "/another/place/a.png")).all()
    assert (first != shift_image(image, name, "/one/place/b.png")).any()
    assert (first != image).any()


def test_night_darkens_every_channel_and_blue_least(image):
    before, after = image.mean((0, 1)), shift_image(image, "night", "a.png").mean((0, 1))
    ratio = after / before
    assert (ratio < 0.7).all() and ratio[2] == ratio.max()


def test_fog_hides_the_distance_and_not_the_road(image):
    after = shift_image(image, "fog", "a.png")
    top, bottom = slice(0, 128), slice(448, 512)
    assert after[top].std() < 0.4 * image[top].std()
    assert after[bottom].std() > 0.8 * image[bottom].std()


def test_fog_follows_koschmieders_law_at_full_distance(image):
    """Two images in the same fog: their difference shrinks by the transmission alone."""
    other = 255 - image
    one, two = (shift_image(each, "fog", "a.png").astype(float) for each in (image, other))
    ratio = (one - two) / (image.astype(float) - other)
    # Rounding to whole numbers moves the ratio by up to 1 / |difference|.
    strong = np.abs(image.astype(float) - other).min(-1) > 100
    assert np.abs(ratio[strong][:, 0] - ratio[strong][:, 1]).max() < 0.03


def test_blur_is_relative_to_the_height():
    edge = np.zeros((1024, 64, 3), np.uint8)
    edge[:, 32:] = 255
    large = shift_image(edge, "blur", "a.png")[512, :, 0]
    small = shift_image(edge[:256], "blur", "a.png")[128, :, 0]
    widths = [int(((row > 10) & (row < 245)).sum()) for row in (large, small)]
    assert widths[0] > 2 * widths[1] > 0
