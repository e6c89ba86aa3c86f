"""The stages of training, counted on models without numbers."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.engine.perturbation import build_perturbation
from fishertune_d2.engine.precision import ESTIMATE_DTYPES, autocast_dtype
from fishertune_d2.engine.stages import attach, prepare_stage
from fishertune_d2.engine.step_trainer import largest_part
from fishertune_d2.fisher import ESTIMATORS, find_candidates, keeping_activations
from fishertune_d2.tuning import SelectedWeights, TuningMethod

from .flops import Flops, TrainingPass, count_flops
from .imagined import autocast_on, imagine, imagine_selection, on_device, padded_size
from .memory import Memory, estimator_bytes, held_bytes, optimizer_bytes, saved_bytes, weight_bytes


@dataclass(frozen=True)
class Stage:
    """One stage of training, in one process.

    Attributes:
        name: "warmup", "estimation" or "tuning".
        steps: iterations, or batches of the estimate.
        images: in a batch.
        flops: multiply-adds of a step; see :mod:`fishertune_d2.plan.flops`.
        uncounted: operators that ``flops`` leaves out though they may matter, and how often each
            is met in a pass.
        memory: what a step holds.
    """

    name: str
    steps: int
    images: int
    flops: int
    uncounted: Counter
    memory: Memory


def plan_stages(cfg: CfgNode, method: TuningMethod, size: tuple[int, int]) -> list[Stage]:
    """Counts the stages that a run of a config goes through, in their order.

    Args:
        cfg: the config.
        method: its tuning method.
        size: (height, width) of a training image, in pixels.
    """
    runs = runs_of(cfg, method)
    held = count_held(cfg, method, runs)
    flops = count_passes(cfg, method, size, runs)
    kept = count_activations(cfg, method, size, runs)
    stages = []
    for name, (steps, images) in runs.items():
        image = flops[name].forward + flops[name].backward
        if name == "tuning" and cfg.MODEL.VFM.CHECKPOINT_BLOCKS:
            image += flops[name].recomputed
        if name == "estimation":  # on x and on x'
            image = 2 * ESTIMATORS[cfg.FISHER.ESTIMATOR].cost.passes * flops[name].measuring
        memory = replace(held[name], activations=kept[name])
        stages.append(Stage(name, steps, images, images * image, flops[name].uncounted, memory))
    return stages


def runs_of(cfg: CfgNode, method: TuningMethod) -> dict[str, tuple[int, int]]:
    """The stages of a run, with the number of steps and of images in a batch."""
    solver, fisher, tuning = cfg.SOLVER, cfg.FISHER, cfg.TUNING
    runs = {}
    if tuning.WARMUP_ITERS > 0 and not tuning.WARMUP_CHECKPOINT:
        runs["warmup"] = tuning.WARMUP_ITERS, solver.IMS_PER_BATCH
    if solver.MAX_ITER > tuning.WARMUP_ITERS:
        if method.selects and method.estimates and not fisher.ESTIMATE:
            runs["estimation"] = fisher.BATCHES, fisher.IMS_PER_BATCH
        runs["tuning"] = solver.MAX_ITER - tuning.WARMUP_ITERS, solver.IMS_PER_BATCH
    return runs


def count_held(cfg: CfgNode, method: TuningMethod, runs: Collection[str]) -> dict[str, Memory]:
    """What each stage holds beside activations."""
    model = imagine(cfg)
    plain = Memory(weights=weight_bytes(model))
    candidates, cost = find_candidates(model.backbone), ESTIMATORS[cfg.FISHER.ESTIMATOR].cost
    _enter("warmup", cfg, model, method)
    warmup = replace(plain, **optimizer_bytes(cfg, model))
    estimation = replace(
        plain,
        # The decoder's gradients are those of its last step, its moments also another run's.
        gradients=warmup.gradients if "warmup" in runs else 0,
        optimizer=warmup.optimizer if cfg.TUNING.WARMUP_ITERS else 0,
        fisher=estimator_bytes(cost, candidates),
    )
    selected = _enter("tuning", cfg, model, method)
    tuning = replace(plain, **optimizer_bytes(cfg, model), weights=weight_bytes(model))
    if selected:
        vectors = tuning.weights - plain.weights
        held = vectors + held_bytes(selected.extra_tensors())
        tuning = replace(tuning, weights=plain.weights, selection=held)
    return {"warmup": warmup, "estimation": estimation, "tuning": tuning}


def count_passes(
    cfg: CfgNode, method: TuningMethod, size: tuple[int, int], runs: Iterable[str]
) -> dict[str, Flops]:
    """What a training pass over one image takes in each stage."""
    model = imagine(cfg)
    size = padded_size(model, size)
    images = torch.empty(1, 3, *size, device="meta")
    labels = torch.empty(1, *size, dtype=torch.int64, device="meta")
    flops: dict[str, Flops] = {}
    known: dict[frozenset[str], Flops] = {}
    for name in runs:
        require_dense(name, model, method)
        trained = frozenset(name for name, p in model.named_parameters() if p.requires_grad)
        if trained not in known:
            with keeping_activations(model):
                known[trained] = count_flops(TrainingPass(model), [images, labels])
        flops[name] = known[trained]
    return flops


def count_activations(
    cfg: CfgNode, method: TuningMethod, size: tuple[int, int], runs: Mapping[str, tuple[int, int]]
) -> dict[str, int]:
    """Bytes that a forward pass of each stage keeps for the backward pass."""
    kept = {}
    for name, (_, images) in runs.items():
        model = imagine(cfg)
        if name == "tuning":
            attach(model, method)  # now, for peft moves layers in a way that fake tensors refuse
        with on_device(model, torch.device(cfg.MODEL.DEVICE)):
            _enter(name, cfg, model, method)
            kept[name] = saved_bytes(model, _loss(name, cfg, model, images, size))
    return kept


def require_dense(name: str, model: nn.Module, method: TuningMethod) -> None:
    """Lets every tensor require a gradient whose whole gradient a stage computes.

    In tuning those are all that hold a selected weight, for it is picked from the whole gradient.
    """
    if name == "tuning" and not method.selects:
        prepare_stage(model, name, method, None)
        return
    prepare_stage(model, "warmup", method, None)
    tensors = []
    if name == "estimation":
        tensors = [candidate.parameter for candidate in find_candidates(model.backbone)]
    elif name == "tuning":
        tensors = method.parameters(model.backbone).values()
    for tensor in tensors:
        tensor.requires_grad_(True)


def _enter(
    name: str, cfg: CfgNode, model: nn.Module, method: TuningMethod
) -> SelectedWeights | None:
    """Makes a model as it is in a stage; after tuning there is no way back."""
    if name == "tuning":
        selection = imagine_selection(cfg, model.backbone, method) if method.selects else None
        return prepare_stage(model, "tuning", method, selection)[1]
    require_dense(name, model, method)
    return None


def _loss(
    name: str, cfg: CfgNode, model: nn.Module, images: int, size: tuple[int, int]
) -> Callable[[], object]:
    """What a stage computes in a forward pass, on a batch without numbers."""
    dtype = autocast_dtype(cfg)
    loss, shift, kept = model, nullcontext(), nullcontext()
    if name != "estimation":
        images = largest_part(images, cfg.SOLVER.ACCUMULATE)
        if name == "tuning" and cfg.TUNING.FEATURE_PERTURBATION:
            shift = build_perturbation(cfg, model.backbone).drawing()
    else:
        images = ESTIMATORS[cfg.FISHER.ESTIMATOR].cost.images or images
        dtype = ESTIMATE_DTYPES[cfg.FISHER.PRECISION]
        loss_fn = SegmentationLoss()
        loss_fn = loss_fn.sampled if cfg.FISHER.LABELS == "sampled" else loss_fn
        loss, shift = partial(loss_fn, model), build_perturbation(cfg, model.backbone).drawing()
        kept = keeping_activations(model)
    size = padded_size(model, size)
    batch = [
        {
            "image": torch.empty(3, *size, dtype=torch.uint8),
            "sem_seg": torch.empty(*size, dtype=torch.uint8),
        }
        for _ in range(images)
    ]

    def run() -> object:
        with shift, kept, autocast_on(torch.device(cfg.MODEL.DEVICE), dtype):
            return loss(batch)

    return run
