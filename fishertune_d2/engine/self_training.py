"""Self-training on images without labels, as in CLOUDS (CVPR 2024), for every method and head.

A teacher labels each unlabelled image: the model itself, with a moving average of its head (EMA).
The teacher sees the image without colour jitter, the student with it. Each pixel gets the class of
the largest score, whatever the score is. SAM may refine the labels.

The backbone is the student's current one. It is frozen in CLOUDS; a method that tunes it moves the
teacher's backbone at once.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import cast

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor, nn

from fishertune_d2.data import find_unlabelled
from fishertune_d2.data.unlabelled import Unlabelled
from fishertune_d2.modeling.heads import in_eval_mode
from fishertune_d2.modeling.sam_masks import load_sam, refine
from fishertune_d2.modeling.segmentor import VFMSegmentor

from .weight_average import average_into

# (label (H, W), image (3, H, W), generator) -> label (H, W)
Refine = Callable[[np.ndarray, Tensor, np.random.Generator], np.ndarray]


class SelfTraining(HookBase):
    """Labels the unlabelled images of each batch, and lets the teacher follow the student.

    The teacher starts as the head at the beginning of the tuning stage. Every ``period`` iterations
    teacher = d * teacher + (1 - d) * head. A checkpoint keeps it, so a resumed run goes on exactly.

    Args:
        start: the first iteration of the tuning stage.
        decay: d.
        period: iterations between two updates of the teacher.
        dtype: the dtype of autocast; None for no autocast.
        seed: seed of the points at which SAM is asked.
        refine: improves labels; None to keep them as they are.

    Attributes:
        teacher: the head's averaged weights by name; empty before ``start``.
    """

    def __init__(
        self,
        start: int,
        decay: float,
        period: int,
        dtype: torch.dtype | None = None,
        seed: int = 0,
        refine: Refine | None = None,
    ):
        self.start = start
        self.decay = decay
        self.period = period
        self.dtype = dtype
        self.seed = seed
        self.refine = refine
        self.teacher: dict[str, Tensor] = {}

    def before_step(self) -> None:
        """Draws the batch of this step, and labels its images without labels."""
        if self.trainer.iter < self.start:
            return
        if not self.teacher:
            self.teacher = {name: p.detach().clone() for name, p in self._trained().items()}
        batch = self.trainer._trainer.draw()
        waiting = [(i, item) for i, item in enumerate(batch) if "clean_image" in item]
        if not waiting:
            return
        model = self._model()
        with self._as_teacher(), in_eval_mode(model), torch.no_grad():
            for i, item in waiting:
                item["sem_seg"] = self._label(model, item, i)

    @torch.no_grad()
    def after_step(self) -> None:
        """Moves the teacher towards the student."""
        done = self.trainer.iter + 1 - self.start
        if self.teacher and done % self.period == 0:
            average_into(self.teacher, self._trained(), self.decay)

    def state_dict(self) -> dict:
        """The teacher's weights."""
        return self.teacher

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores the teacher on the model's device."""
        device = self._model().device
        self.teacher = {name: tensor.to(device, copy=True) for name, tensor in state.items()}

    def _label(self, model: VFMSegmentor, item: dict, place: int) -> Tensor:
        """The pseudo-labels of an image, (H, W) uint8 on the CPU; padding is ignored."""
        height, width = item["valid_size"]
        image = item["clean_image"][:, :height, :width]
        with torch.autocast(model.device.type, self.dtype, enabled=self.dtype is not None):
            scores = model.scores(image)
        label = scores.argmax(0).to("cpu", torch.uint8)
        if self.refine is not None:
            words = [self.seed, comm.get_rank(), self.trainer.iter, place]
            generator = np.random.default_rng(np.random.SeedSequence(words))
            label = torch.from_numpy(self.refine(label.numpy(), image, generator))
        ignore = model.head.ignore_value
        whole = torch.full(item["image"].shape[-2:], ignore, dtype=torch.uint8)
        whole[:height, :width] = label
        return whole

    def _model(self) -> VFMSegmentor:
        return cast(VFMSegmentor, self.trainer.segmentor)

    def _trained(self) -> dict[str, nn.Parameter]:
        """The weights of the head that train."""
        head = self._model().sem_seg_head
        return {name: p for name, p in head.named_parameters() if p.requires_grad}

    @contextmanager
    def _as_teacher(self) -> Iterator[None]:
        """Gives the head the teacher's weights in a ``with`` block, without copying any."""
        own = self._trained()
        students = {name: p.data for name, p in own.items()}
        for name, weight in self.teacher.items():
            own[name].data = weight
        try:
            yield
        finally:
            for name, weight in students.items():
                own[name].data = weight


def build_self_training(cfg: CfgNode, dtype: torch.dtype | None) -> SelfTraining | None:
    """The hook that SELF_TRAINING asks for, or None."""
    keys = cfg.SELF_TRAINING
    if not keys.IMAGES:
        return None
    improve: Refine | None = None
    if keys.SAM:
        predict = load_sam(keys.SAM, cfg.MODEL.DEVICE, cfg.INPUT.FORMAT)
        ignore = cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE

        def improve(label: np.ndarray, image: Tensor, generator: np.random.Generator) -> np.ndarray:
            return refine(label, lambda points: predict(image, points), generator, ignore)

    start = cfg.TUNING.WARMUP_ITERS
    return SelfTraining(start, keys.EMA, keys.PERIOD, dtype, cfg.SEED, improve)


def unlabelled_images(cfg: CfgNode) -> Unlabelled | None:
    """The images of SELF_TRAINING.IMAGES, which join the stream with the tuning stage, or None."""
    keys = cfg.SELF_TRAINING
    if not keys.IMAGES:
        return None
    begin = cfg.TUNING.WARMUP_ITERS * cfg.SOLVER.IMS_PER_BATCH
    return Unlabelled(find_unlabelled(keys.IMAGES), keys.RATIO, begin)


def self_training_troubles(cfg: CfgNode) -> Iterator[str]:
    """Yields what in SELF_TRAINING cannot work."""
    keys = cfg.SELF_TRAINING
    if not keys.IMAGES:
        return
    if not 0.5 <= keys.EMA < 1:
        yield f"SELF_TRAINING.EMA is {keys.EMA}: choose a decay from 0.5 to below 1"
    if keys.PERIOD < 1 or keys.RATIO < 1:
        yield (
            f"SELF_TRAINING.PERIOD is {keys.PERIOD} and SELF_TRAINING.RATIO {keys.RATIO}: choose "
            "at least 1 iteration and at least 1 image"
        )
    if cfg.TUNING.WARMUP_ITERS == 0 and not cfg.MODEL.WEIGHTS:
        yield (
            "SELF_TRAINING.IMAGES would be labelled by a head that has learned nothing: set "
            "MODEL.WEIGHTS to the checkpoint of a trained model, or TUNING.WARMUP_ITERS above 0"
        )
