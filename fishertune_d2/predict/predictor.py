"""A trained run as a function: an image in, a class and a confidence for each pixel out.

Shapes:
    C: classes of the model; H, W: an image as it lies on disk, in pixels
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from fishertune_d2.config import read_config
from fishertune_d2.data.image_files import to_array
from fishertune_d2.data.mapper import fit_into, to_tensor
from fishertune_d2.engine.precision import scoring_autocast
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.evaluation import best_classes

from .classes import recorded_space, registered_space

logger = logging.getLogger(__name__)


# An image in one piece that has more times the pixels of INPUT.CROP.SIZE than this gets a warning:
# those of a test set have 8 (Cityscapes on crops of 512 x 512).
_MANY_TIMES = 10


class InputError(ValueError):
    """Inputs that cannot be drawn as they are; the message names the file and the remedy."""


@dataclass(frozen=True)
class Prediction:
    """What a model says of an image.

    Attributes:
        classes: (H, W) uint8 classes of the predictor's ``space``, or ``IGNORE_LABEL`` where that
            has no such class.
        confidence: (H, W) float32 in 0 .. 1; see :func:`confidence_of`.
    """

    classes: np.ndarray
    confidence: np.ndarray


class Predictor:
    """Predicts images one by one, as the evaluation does: same windows, same size, same autocast.

    That size is the test size of the first data set of the config that is registered, or else as
    the run wrote it down; where it has none, images keep their own.

    Attributes:
        space: names and colours of the classes, those that this data set is scored in.
        size: that size, (width, height), or None.
    """

    def __init__(self, cfg: CfgNode):
        """Builds the model and reads its weights.

        Args:
            cfg: of a run, with MODEL.WEIGHTS; see :func:`read_run`.

        Raises:
            ValueError: if the weights do not fit the config, the data set has another number of
                classes than the model, or the device is not there.
        """
        registered = registered_space(cfg)
        self.model = build_trained(cfg, cfg.MODEL.WEIGHTS)
        record = self.model.trained_by
        self.space, self.size = registered or recorded_space(cfg, record and record.classes)
        self._format = cfg.INPUT.FORMAT
        self._collapse = self.space.table()
        self._cfg = cfg
        self._warned = False

    def __call__(self, image: np.ndarray) -> Prediction:
        """Predicts one image.

        Args:
            image: (H, W, 3) uint8 RGB.

        Raises:
            InputError: if the memory is not enough for an image of this size; says what is.
        """
        height, width = image.shape[:2]
        picture = Image.fromarray(image)
        fitted = fit_into(picture, self.size) if self.size else picture
        self._warn_of_size(*fitted.size)
        # Pillow's memory is read-only.
        pixels = to_tensor(to_array(fitted, self._format).copy())
        inputs = {"image": pixels, "height": height, "width": width}
        try:
            with scoring_autocast(self._cfg, self.model.device):
                (output,) = self.model([inputs])
            scores = output["sem_seg"]
            classes = self._collapse[best_classes(scores)]
            return Prediction(classes, confidence_of(scores).cpu().numpy())
        except (MemoryError, RuntimeError) as error:
            if not _ran_out_of_memory(error):
                raise
            said = str(error).strip().splitlines()
            raise InputError(
                f"the memory of {self.model.device} is not enough for an image of {width} x "
                f"{height} pixels: {self._smaller()} ({said[0] if said else 'MemoryError'})"
            ) from error

    def _warn_of_size(self, width: int, height: int) -> None:
        """Says once that an image in one piece is far larger than what was trained on."""
        crop = self._cfg.INPUT.CROP
        trained = crop.SIZE if crop.ENABLED else self._cfg.MODEL.VFM.IMG_SIZE
        times = width * height / prod(trained)
        if self._warned or self._cfg.TEST.MODE != "whole" or times < _MANY_TIMES:
            return
        self._warned = True
        logger.warning(
            "An image of %d x %d pixels passes through the model in one piece (TEST.MODE whole). "
            "That is %.0f times what it was trained on, so it needs much memory, and its classes "
            "may be worse: %s",
            width,
            height,
            times,
            self._smaller(),
        )

    def _smaller(self) -> str:
        """How less of an image passes through the model at once."""
        cfg, ways = self._cfg, []
        if cfg.TEST.MODE == "whole":
            ways.append("--opts TEST.MODE slide for windows (TEST.CROP_SIZE, TEST.STRIDE)")
        elif cfg.TEST.WINDOWS_PER_BATCH > 1:
            ways.append("--opts TEST.WINDOWS_PER_BATCH 1")
        for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][:1]:
            ways.append(f"--opts TEST.SIZES \"[['{name}', 1024, 512]]\" for smaller images")
        return f"add {', or '.join(ways)}" if ways else "draw it in parts, or make it smaller"


def _ran_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # A GPU has an error of its own for it; a CPU's allocator has a RuntimeError for everything.
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        each in str(error) for each in words
    )


def confidence_of(scores: torch.Tensor) -> torch.Tensor:
    """How clearly each pixel belongs to its class, from 0 to 1.

    Mask2Former's scores are sums over its queries and no probabilities: 0 for all classes where no
    query claims the pixel, more than 1 in sum where several do. So the best score is divided by the
    sum over classes, but by no less than 1: both a pixel that two classes claim and one that none
    does are doubtful. Nothing calibrates this number.

    Args:
        scores: (C, H, W), not negative.

    Returns:
        (H, W).
    """
    return scores.max(dim=0).values / scores.sum(dim=0).clamp(min=1)


def read_run(config_file: str | Path, options: Sequence[str] = ()) -> CfgNode:
    """Reads the config of a run, with the weights that the run ended with.

    Args:
        config_file: the run's own ``config.yaml``, or any other config.
        options: keys and values in turn, which go before those of the file. Without MODEL.WEIGHTS
            among them, ``model_final.pth`` beside the file is taken if it is there, because a run's
            config names what it started from.

    Returns:
        The config, frozen.

    Raises:
        FileNotFoundError: if the config or the weights are not there.
        ValueError: if no weights are named.
    """
    own = Path(config_file).with_name("model_final.pth")
    if "MODEL.WEIGHTS" not in options[::2] and own.is_file():
        options = [*options, "MODEL.WEIGHTS", str(own)]
    cfg = read_config(str(config_file), options)
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            f"{config_file} names no weights, and there is no {own.name} beside it: add "
            "--opts MODEL.WEIGHTS FILE with a checkpoint of a run"
        )
    if "://" not in weights and not Path(weights).is_file():
        raise FileNotFoundError(f"MODEL.WEIGHTS is {weights}, and there is no such file")
    return cfg
