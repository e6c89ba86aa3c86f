"""A config's run on models without values: its stages, and what a step of each computes.

This is where the plan reads the config. The counting (stage_costs.py) asks a FakeRun.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from detectron2.config import CfgNode
from torch import Tensor

from fishertune_d2.config import changed
from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.engine.optimizer import build_optimizer
from fishertune_d2.engine.parameter_counts import count_tuned
from fishertune_d2.engine.perturbation import build_perturbation, build_shift
from fishertune_d2.engine.precision import ESTIMATE_DTYPES, autocast_dtype
from fishertune_d2.engine.stages import attach, prepare_stage
from fishertune_d2.engine.step_trainer import largest_part
from fishertune_d2.fisher import (
    ESTIMATORS,
    Cost,
    Selection,
    find_candidates,
    keeping_activations,
)
from fishertune_d2.modeling.heads import in_eval_mode
from fishertune_d2.modeling.segmentor import VFMSegmentor
from fishertune_d2.tuning import SelectedWeights, TuningMethod

from .fake_model import fake_autocast, fake_batch, fake_model, fake_selection


class Pass(NamedTuple):
    """A forward and a backward pass; a step of a stage consists of some of them."""

    loss: Callable[[], Tensor]  # computes the loss of the pass, or one loss for each image
    wanted: Sequence[Tensor]  # the tensors whose gradients the backward pass computes
    images: int  # how many images the pass covers
    repeats: int = 1  # how often a step covers each of its images
    forwards: int = 0  # further forward passes over each image, without gradients


class FakeRun:
    """The stages that a config's run goes through, on models without values.

    Attributes:
        method: the tuning method.
        device: MODEL.DEVICE, which need not exist.
        stages: the steps and the images of a batch, for each of "warmup", "estimation" and
            "tuning" that the run goes through, in order.
        warms_up: whether the decoder was warmed up before the estimation, by this run or another.
        cost: how much work and memory the estimator of F needs.
    """

    def __init__(self, cfg: CfgNode, method: TuningMethod, size: tuple[int, int]):
        """Reads the stages of a config, whose training images have (height, width) = ``size``."""
        self._cfg, self._size = cfg, size
        self.method, self.device = method, torch.device(cfg.MODEL.DEVICE)
        self.stages = stage_lengths(cfg, method)
        self.warms_up = cfg.TUNING.WARMUP_ITERS > 0
        self.cost: Cost = ESTIMATORS[cfg.FISHER.ESTIMATOR].cost

    def model(self, name: str) -> VFMSegmentor:
        """The segmentor on the meta device, with the weights that the method adds in this stage."""
        model = fake_model(self._cfg)
        if name == "tuning":
            # Now, because peft moves layers in a way that FakeTensors refuse.
            attach(model, self.method)
        return model

    def enter(self, name: str, model: VFMSegmentor) -> SelectedWeights | None:
        """Turns the model into that of a stage; returns the selected weights of tuning."""
        if name != "tuning":  # estimation begins as the warm-up leaves the model
            prepare_stage(model, "warmup", self.method, None)
            return None
        selection = self.selection(model) if self.method.selects else None
        return prepare_stage(model, "tuning", self.method, selection)[1]

    def enter_end(self, name: str, model: VFMSegmentor) -> None:
        """Turns the model into that at the end of a stage, where a step of tuning costs most."""
        selected = self.enter(name, model)
        if selected is not None:
            selected.grow(selected.selection.share)

    def averages(self, name: str) -> bool:
        """Whether the stage averages the weights that it trains."""
        return name == "tuning" and self._cfg.SOLVER.EMA > 0

    def self_trains(self, name: str) -> bool:
        """Whether a teacher labels images in the stage."""
        return name == "tuning" and bool(self._cfg.SELF_TRAINING.IMAGES)

    def selection(self, model: VFMSegmentor) -> Selection:
        """The units that are selected at the end of tuning, by a method that selects."""
        base = sum(p.numel() for p in model.backbone.parameters())
        count = count_tuned(self._cfg, model.backbone, progress=1.0)
        parameters = self.method.parameters(model.backbone)
        selection = fake_selection(parameters, count, base, self._cfg.TUNING.UNIT)
        if self._cfg.TUNING.STEPS == "fisher":
            ranks = selection.ranks.items()
            selection.steps = {name: torch.ones_like(n, dtype=torch.float32) for name, n in ranks}
        return selection

    def optimizer(self, model: VFMSegmentor) -> torch.optim.Optimizer:
        """The optimizer of the stage that the model is in."""
        # The meta device has no fused step; the state is the same.
        return build_optimizer(changed(self._cfg, ["SOLVER.FUSED", False]), model)

    def one_pass(self, name: str, model: VFMSegmentor, device: torch.device) -> Pass:
        """The largest pass of a stage's step, for a model that has entered the stage."""
        if name == "estimation":
            dtype = ESTIMATE_DTYPES[self._cfg.FISHER.PRECISION]
            return self._estimation(model, fake_autocast(device, dtype))
        return self._training(name, model, fake_autocast(device, autocast_dtype(self._cfg)))

    def _training(self, name: str, model: VFMSegmentor, autocast: AbstractContextManager) -> Pass:
        images = largest_part(self.stages[name][1], self._cfg.SOLVER.ACCUMULATE)
        batch = fake_batch(model, images, self._size)
        shift: AbstractContextManager = nullcontext()
        if name == "tuning" and self._cfg.TUNING.FEATURE_PERTURBATION:
            shift = build_perturbation(self._cfg, model.backbone).drawing()

        ratio = self._cfg.SELF_TRAINING.RATIO if self.self_trains(name) else 0
        unlabelled = round(images * ratio / (1 + ratio))  # SAM is not counted

        def loss() -> Tensor:
            with autocast:
                with in_eval_mode(model), torch.no_grad():
                    for item in batch[:unlabelled]:
                        model.scores(item["image"])
                with shift:
                    return torch.stack(list(model(batch).values())).sum()

        return Pass(loss, [p for p in model.parameters() if p.requires_grad], images)

    def _estimation(self, model: VFMSegmentor, autocast: AbstractContextManager) -> Pass:
        images = self.cost.images or self.stages["estimation"][1]
        batch = fake_batch(model, images, self._size)
        wanted = [candidate.parameter for candidate in find_candidates(model.backbone)]
        for parameter in wanted:
            parameter.requires_grad_(True)
        score = SegmentationLoss()
        loss_fn: Callable = score.sampled if self._cfg.FISHER.LABELS == "sampled" else score
        shift = build_shift(self._cfg, model.backbone)

        def loss() -> Tensor:
            with shift.drawing(), keeping_activations(model), autocast:
                return loss_fn(model, batch)

        # On the images, and on their shift.
        draws = self.cost.draws if shift.draws_in_model else 0
        return Pass(loss, wanted, images, 2 * self.cost.passes, draws)


def stage_lengths(cfg: CfgNode, method: TuningMethod) -> dict[str, tuple[int, int]]:
    """The steps and images of a run's own stages, without those that another run made for it."""
    solver, fisher, tuning = cfg.SOLVER, cfg.FISHER, cfg.TUNING
    lengths = {}
    if tuning.WARMUP_ITERS > 0 and not tuning.WARMUP_CHECKPOINT:
        lengths["warmup"] = tuning.WARMUP_ITERS, solver.IMS_PER_BATCH
    if solver.MAX_ITER > tuning.WARMUP_ITERS:
        if method.selects and method.estimates and not fisher.ESTIMATE:
            lengths["estimation"] = fisher.BATCHES, fisher.IMS_PER_BATCH
        lengths["tuning"] = solver.MAX_ITER - tuning.WARMUP_ITERS, solver.IMS_PER_BATCH
    return lengths
