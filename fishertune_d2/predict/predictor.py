"""Predicts a class and a confidence for each pixel of an image with a trained run.

Shapes:
    C: classes of the model; H, W: an image as it is on disk, in pixels
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode
from PIL import Image

from fishertune_d2.config import read_config
from fishertune_d2.data.image_files import to_array
from fishertune_d2.data.mapper import fit_into, to_tensor
from fishertune_d2.engine.precision import scoring_autocast
from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.evaluation import best_classes
from fishertune_d2.run import Run

from .classes import recorded_space, registered_space
from .inputs import InputError

logger = logging.getLogger(__name__)

# An image in one piece with this many times the pixels of INPUT.CROP.SIZE gets a warning. Test
# images have 8 times (Cityscapes on crops of 512 x 512).
_MANY_TIMES = 10


@dataclass(frozen=True)
class Prediction:
    """The prediction of an image.

    Attributes:
        classes: (H, W) uint8 classes of the predictor's ``space``, or ``IGNORE_LABEL`` for classes
            that it lacks.
        confidence: (H, W) float32 in 0 .. 1; see :func:`confidence_of`.
    """

    classes: np.ndarray
    confidence: np.ndarray


class Predictor:
    """Predicts images one by one, with the windows, size and autocast of the evaluation.

    The size is the test size of the first registered data set of the config, or else the one that
    the run recorded. Without either, images keep their own size.

    Attributes:
        space: names and colours of the classes in which this data set is scored.
        size: the test size, (width, height), or None.
    """

    def __init__(self, cfg: CfgNode):
        """Builds the model of a run's config, see :func:`read_run`, and reads its weights.

        Weights or a data set that do not fit the config, and a missing device, raise a ValueError.
        """
        registered = registered_space(cfg)
        self.model = build_trained(cfg, cfg.MODEL.WEIGHTS)
        self._device = torch.device(cfg.MODEL.DEVICE)
        record = cast(RunRecord | None, self.model.trained_by)
        trained = record.classes if record else None
        self.space, self.size = registered or recorded_space(cfg, trained)
        self._format = cfg.INPUT.FORMAT
        self._collapse = self.space.table()
        self._cfg = cfg
        self._warned = False

    def __call__(self, image: np.ndarray) -> Prediction:
        """Returns the prediction of an image, (H, W, 3) uint8 RGB, at its size.

        If the memory is too small for it, the error is an InputError that names the remedies.
        """
        height, width = image.shape[:2]
        picture = Image.fromarray(image)
        fitted = fit_into(picture, self.size) if self.size else picture
        self._warn_of_size(*fitted.size)
        # Pillow's memory is read-only.
        pixels = to_tensor(to_array(fitted, self._format).copy())
        inputs = {"image": pixels, "height": height, "width": width}
        with self._remedies_for_memory(width, height):
            with scoring_autocast(self._cfg, self._device):
                (output,) = self.model([inputs])
            scores = output["sem_seg"]
            classes = self._collapse[best_classes(scores)]
            return Prediction(classes, confidence_of(scores).cpu().numpy())

    @contextmanager
    def _remedies_for_memory(self, width: int, height: int) -> Iterator[None]:
        """Turns an error for lack of memory into an InputError with the remedies."""
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not _ran_out_of_memory(error):
                raise
            said = str(error).strip().splitlines()
            raise InputError(
                f"the memory of {self._device} is not enough for an image of {width} x "
                f"{height} pixels: {self._smaller()} ({said[0] if said else 'MemoryError'})"
            ) from error

    def _warn_of_size(self, width: int, height: int) -> None:
        """Warns once of an image in one piece that is far larger than the training crops."""
        crop = self._cfg.INPUT.CROP
        trained = crop.SIZE if crop.ENABLED else self._cfg.MODEL.VFM.IMG_SIZE
        times = width * height / prod(trained)
        if self._warned or self._cfg.TEST.MODE != "whole" or times < _MANY_TIMES:
            return
        self._warned = True
        logger.warning(
            f"An image of {width} x {height} pixels passes through the model in one piece "
            f"(TEST.MODE whole). That is {times:.0f} times what it was trained on, so it needs "
            f"much memory, and its classes may be worse: {self._smaller()}"
        )

    def _smaller(self) -> str:
        """Names the options with which less of an image passes through the model at once."""
        cfg, ways = self._cfg, []
        if cfg.TEST.MODE == "whole":
            ways.append("--opts TEST.MODE slide for windows (TEST.CROP_SIZE, TEST.STRIDE)")
        elif cfg.TEST.WINDOWS_PER_BATCH > 1:
            ways.append("--opts TEST.WINDOWS_PER_BATCH 1")
        for name in [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN][:1]:
            own = "TEST.PROTOCOL '' " if cfg.TEST.PROTOCOL else ""  # it may set another size
            ways.append(f"--opts {own}TEST.SIZES \"[['{name}', 1024, 512]]\" for smaller images")
        return f"add {', or '.join(ways)}" if ways else "draw it in parts, or make it smaller"


def _ran_out_of_memory(error: MemoryError | RuntimeError) -> bool:
    # A GPU has its own error for it; a CPU's allocator raises a RuntimeError.
    words = ("out of memory", "not enough memory", "can't allocate memory")
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        each in str(error) for each in words
    )


def confidence_of(scores: torch.Tensor) -> torch.Tensor:
    """Returns (H, W) numbers from 0 to 1: how clearly each pixel belongs to its class.

    Mask2Former's scores are sums over its queries, not probabilities. They are 0 for all classes if
    no query claims the pixel, and more than 1 in sum if several do. So the best score is divided by
    the sum over classes, but at least by 1: a pixel that two classes claim is doubtful, and so is
    one that none does. This number is not calibrated.

    Args:
        scores: (C, H, W), not negative.
    """
    return scores.max(dim=0).values / scores.sum(dim=0).clamp(min=1)


def read_run(config_file: str | Path, options: Sequence[str] = ()) -> CfgNode:
    """Returns the frozen config of a run, with its final weights as MODEL.WEIGHTS.

    Args:
        config_file: the run's own ``config.yaml``, or any other config.
        options: keys and values in turn that replace those of the file. Without MODEL.WEIGHTS among
            them, ``model_final.pth`` beside the file is used if it exists, because a run's config
            names the weights from which it started.

    Raises:
        FileNotFoundError: if the weights do not exist.
        ValueError: if no weights are named, or only those from which an unfinished run started.
    """
    folder = Path(config_file).parent
    own, named = Run(folder).checkpoint, "MODEL.WEIGHTS" in options[::2]
    if not named and own.is_file():
        options = [*options, "MODEL.WEIGHTS", str(own)]
    cfg = read_config(str(config_file), options)
    weights = cfg.MODEL.WEIGHTS
    if not weights:
        raise ValueError(
            f"{config_file} names no weights, and there is no {own.name} beside it: add "
            "--opts MODEL.WEIGHTS FILE with a checkpoint of a run"
        )
    # Only a training writes metrics.json; the config of an evaluation names what it has scored.
    if not named and not own.is_file() and (folder / "metrics.json").is_file():
        raise ValueError(
            f"there is no {own.name} of the training in {folder} yet, and {config_file} names the "
            f"weights from which it started, {weights}: add --opts MODEL.WEIGHTS FILE with one of "
            "its checkpoints"
        )
    if "://" not in weights and not Path(weights).is_file():
        raise FileNotFoundError(f"MODEL.WEIGHTS is {weights}, and there is no such file")
    return cfg
