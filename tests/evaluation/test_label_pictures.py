import numpy as np
from PIL import Image

from fishertune_d2.data.labels import CITYSCAPES, LABEL_SPACES
from fishertune_d2.evaluation.label_pictures import colorize, draw_comparison

SPACE = LABEL_SPACES["cityscapes19"]


def test_colours_are_cityscapes_and_ignored_is_black():
    colours = colorize(np.array([[0, 10, 255]], dtype=np.uint8), SPACE)
    assert colours.tolist() == [[list(CITYSCAPES["road"]), list(CITYSCAPES["sky"]), [0, 0, 0]]]


def test_panels_lie_side_by_side_above_the_legend(tmp_path):
    image = np.full((40, 50, 3), 9, dtype=np.uint8)
    label, prediction = np.full((40, 50), 0, np.uint8), np.full((40, 50), 13, np.uint8)
    label[0] = 255
    draw_comparison(image, label, prediction, SPACE, tmp_path / "new/folder/x.png")
    picture = Image.open(tmp_path / "new/folder/x.png")
    assert picture.width == 150 and picture.height > 40
    assert picture.getpixel((25, 20)) == (9, 9, 9)
    assert picture.getpixel((75, 0)) == (0, 0, 0)
    assert picture.getpixel((75, 20)) == CITYSCAPES["road"]
    assert picture.getpixel((125, 20)) == CITYSCAPES["car"]
    legend = {colour for _, colour in picture.crop((0, 40, *picture.size)).getcolors(10_000)}
    assert {CITYSCAPES["road"], CITYSCAPES["car"]} <= legend
    assert CITYSCAPES["sky"] not in legend


def test_large_images_are_scaled_without_mixing_colours(tmp_path):
    label = np.zeros((1024, 2048), dtype=np.uint8)
    label[::3] = 10
    image = colorize(label, SPACE)
    draw_comparison(image, label, label, SPACE, tmp_path / "x.png")
    picture = Image.open(tmp_path / "x.png").crop((0, 0, 3072, 512))
    assert {colour for _, colour in picture.getcolors()} == {CITYSCAPES["road"], CITYSCAPES["sky"]}
