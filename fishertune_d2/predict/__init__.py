"""What a trained run sees: classes and confidence of any image, as pictures."""

from fishertune_d2.compat import require_detectron2

require_detectron2()

from .files import draw_file, draw_files, find_inputs, name_outputs  # noqa: E402
from .pictures import draw_prediction  # noqa: E402
from .predictor import InputError, Prediction, Predictor, read_run  # noqa: E402

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
