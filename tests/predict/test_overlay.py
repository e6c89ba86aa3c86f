import numpy as np
import pytest

from fishertune_d2.data.labels import CITYSCAPES, IGNORE_LABEL, LABEL_SPACES
from fishertune_d2.predict import Prediction, draw_prediction
from fishertune_d2.predict.overlay import blend

SPACE = LABEL_SPACES["cityscapes19"]
ROAD, SKY, CAR = 0, 10, 13
DARK, BRIGHT = (68, 1, 84), (253, 231, 37)  # the ends of viridis


@pytest.fixture
def prediction() -> Prediction:
    """Sky above road, 60 x 200; sure of the sky and not of the road."""
    classes = np.full((60, 200), SKY, np.uint8)
    classes[30:] = ROAD
    return Prediction(classes, (classes == SKY).astype(np.float32))


def _colors(picture: np.ndarray) -> set[tuple[int, ...]]:
    return set(map(tuple, picture.reshape(-1, 3).tolist()))


def test_the_image_shows_through_the_colours():
    image = np.full((1, 2, 3), 100, np.uint8)
    mixed = blend(image, np.array([[CAR, IGNORE_LABEL]], np.uint8), SPACE)
    assert mixed.tolist() == [[[50, 50, 121], [100, 100, 100]]]  # halfway from (0, 0, 142)


def test_the_legend_lists_the_classes_that_occur(prediction):
    image = np.zeros((60, 200, 3), np.uint8)
    picture = draw_prediction(image, prediction, SPACE)
    assert picture.shape[1] == 200 and picture.shape[0] > 60
    legend = _colors(picture[60:])
    assert {CITYSCAPES["sky"], CITYSCAPES["road"]} <= legend
    assert CITYSCAPES["car"] not in legend
    assert CITYSCAPES["car"] in _colors(
        draw_prediction(image, prediction, SPACE, legend=[CAR])[60:]
    )


def test_confidence_lies_beside_the_classes_above_its_scale(prediction):
    picture = draw_prediction(np.zeros((60, 200, 3), np.uint8), prediction, SPACE, confidence=True)
    assert picture.shape[1] == 400
    panel, scale = picture[:60, 200:], picture[60:, 200:]
    assert _colors(panel[:30]) == {BRIGHT} and _colors(panel[30:]) == {DARK}
    assert {BRIGHT, DARK} <= _colors(scale)
    assert {CITYSCAPES["sky"], CITYSCAPES["road"]} <= _colors(picture[60:, :200])


def test_names_grow_with_the_image(prediction):
    small = draw_prediction(np.zeros((60, 200, 3), np.uint8), prediction, SPACE)
    classes = np.full((1024, 2048), SKY, np.uint8)
    large = Prediction(classes, np.ones_like(classes, np.float32))
    picture = draw_prediction(np.zeros((1024, 2048, 3), np.uint8), large, SPACE)
    assert len(picture) - 1024 > 2 * (len(small) - 60)


def test_an_image_too_narrow_for_a_scale_is_drawn_all_the_same():
    tiny = Prediction(np.zeros((8, 8), np.uint8), np.ones((8, 8), np.float32))
    picture = draw_prediction(np.zeros((8, 8, 3), np.uint8), tiny, SPACE, confidence=True)
    assert picture.shape[1] == 16
