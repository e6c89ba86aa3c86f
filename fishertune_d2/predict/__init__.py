"""Draws the predictions of a trained run: classes and confidence of any image, as pictures."""

from fishertune_d2.compat import require_detectron2

require_detectron2()

from .drawing import draw_file, draw_files  # noqa: E402
from .inputs import InputError, find_inputs, name_outputs  # noqa: E402
from .overlay import draw_prediction  # noqa: E402
from .predictor import Prediction, Predictor, read_run  # noqa: E402

__all__ = [
    "InputError",
    "Prediction",
    "Predictor",
    "draw_file",
    "draw_files",
    "draw_prediction",
    "find_inputs",
    "name_outputs",
    "read_run",
]
