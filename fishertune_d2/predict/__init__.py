"""What a trained run sees: classes and confidence of any image, as pictures."""

from .files import InputError, draw_file, find_inputs, name_outputs
from .pictures import draw_prediction
from .predictor import Prediction, Predictor, read_run

__all__ = [
    "InputError",
    "Prediction",
    "Predictor",
    "draw_file",
    "draw_prediction",
    "find_inputs",
    "name_outputs",
    "read_run",
]
