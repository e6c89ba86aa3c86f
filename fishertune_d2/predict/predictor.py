"""A trained run as a function: an image in, a class and a confidence for each pixel out.

Shapes:
    C: classes of the model; H, W: an image as it lies on disk, in pixels
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from detectron2.utils.colormap import colormap
from PIL import Image
from torch import nn

from fishertune_d2.config import read_config
from fishertune_d2.data.files import to_array
from fishertune_d2.data.labels import LabelSpace, identity_space
from fishertune_d2.data.mapper import fit_into, to_tensor
from fishertune_d2.engine import WholeCheckpointer
from fishertune_d2.engine.scoring import scoring_autocast
from fishertune_d2.evaluation import best_classes
from fishertune_d2.tuning import build_tuning_method

logger = logging.getLogger(__name__)


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

    That size is the test size of the first data set that the config names; where it has none,
    images keep their own.

    Attributes:
        space: names and colours of the classes, those that this data set is scored in.
    """

    def __init__(self, cfg: CfgNode):
        """Builds the model and reads its weights.

        Args:
            cfg: of a run, with MODEL.WEIGHTS; see :func:`read_run`.

        Raises:
            ValueError: if the weights do not fit the config, the data set has another number of
                classes than the model, or the device is not there.
        """
        self.space, self.size = _space_and_size(cfg)
        self._format = cfg.INPUT.FORMAT
        self._collapse = self.space.table()
        self.model = _load_model(cfg)
        self._cfg = cfg

    def __call__(self, image: np.ndarray) -> Prediction:
        """Predicts one image.

        Args:
            image: (H, W, 3) uint8 RGB.
        """
        height, width = image.shape[:2]
        picture = Image.fromarray(image)
        fitted = fit_into(picture, self.size) if self.size else picture
        pixels = to_tensor(to_array(fitted, self._format))
        inputs = {"image": pixels, "height": height, "width": width}
        with scoring_autocast(self._cfg, self.model.device):
            (output,) = self.model([inputs])
        scores = output["sem_seg"]
        classes = self._collapse[best_classes(scores)]
        return Prediction(classes, confidence_of(scores).cpu().numpy())


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


class _CompleteCheckpointer(WholeCheckpointer):
    """Refuses weights that leave a part of the model as it was initialised."""

    def _load_model(self, checkpoint: dict[str, Any]):
        incompatible = super()._load_model(checkpoint)
        wrong = incompatible.incorrect_shapes
        for name, theirs, ours in wrong:
            if name.endswith("class_predictor.weight"):  # one more than classes, for "no object"
                raise ValueError(
                    f"the weights predict {theirs[0] - 1} classes and the config asks for "
                    f"{ours[0] - 1}: set MODEL.SEM_SEG_HEAD.NUM_CLASSES {theirs[0] - 1} and "
                    "DATASETS.TEST to a data set of these classes, or take the weights' own config"
                )
        if wrong:
            name, theirs, ours = wrong[0]
            trouble = f"{name} has the shape {theirs}, in the model {ours}"
        elif incompatible.missing_keys:
            trouble = f"{incompatible.missing_keys[0]} is not among them"
        else:
            return incompatible
        raise ValueError(
            f"the weights do not fill the model ({len(incompatible.missing_keys)} of its tensors "
            f"are left): {trouble}. Take the config.yaml that lies beside the weights, or weights "
            "of the whole segmentation model"
        )


def _load_model(cfg: CfgNode) -> nn.Module:
    device = cfg.MODEL.DEVICE
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {device!r}, and PyTorch finds no GPU: add --opts MODEL.DEVICE cpu"
        )
    method = build_tuning_method(cfg)
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.VFM.WEIGHTS = "random"  # the public weights are not needed: the file holds all
    log = logging.getLogger("fishertune_d2.modeling.weights")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of random weights, which none stay
    try:
        model = build_model(cfg)
    finally:
        log.setLevel(level)
    try:
        _CompleteCheckpointer(model, method=method).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    except ValueError as error:
        raise ValueError(f"MODEL.WEIGHTS {cfg.MODEL.WEIGHTS}: {error}") from error
    return model.eval()


def _space_and_size(cfg: CfgNode) -> tuple[LabelSpace, tuple[int, int] | None]:
    """Label space and test size, (width, height), of the first data set that is registered."""
    count = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    names = [*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN]
    ours = (name for name in names if name in DatasetCatalog.list())
    name = next((name for name in ours if hasattr(MetadataCatalog.get(name), "label_space")), None)
    if name is None:
        logger.warning(
            "No data set of the config (%s) is registered here, so classes have numbers in place "
            "of names: call register_sem_seg first",
            ", ".join(names) or "it names none",
        )
        palette = colormap(rgb=True).astype(int).tolist()
        colors = [tuple(palette[k % len(palette)]) for k in range(count)]
        return identity_space([f"class {k}" for k in range(count)], colors), None
    metadata = MetadataCatalog.get(name)
    space: LabelSpace = metadata.label_space
    if len(space.collapse) != count:
        raise ValueError(
            f"{name} has {len(space.collapse)} classes and MODEL.SEM_SEG_HEAD.NUM_CLASSES is "
            f"{count}: set DATASETS.TEST to a data set with the model's classes"
        )
    sizes = {data: (width, height) for data, width, height in cfg.TEST.SIZES}
    return space, sizes.get(name, metadata.test_size)
