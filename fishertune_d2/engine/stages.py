"""The parameters that each stage of training trains, for the trainer and the plan."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.fisher import FisherEstimate, Selection, Units, tuned_share
from fishertune_d2.modeling.frozen import frozen_parameters
from fishertune_d2.tuning import SelectedWeights, TuningMethod, build_tuning_method

from .hooks import FisherEstimation, ParameterMask, WeightDecay
from .optimizer import is_backbone
from .weight_average import WeightAverage

STAGES = ("warmup", "tuning")


def attach(model: nn.Module, method: TuningMethod) -> None:
    """Adds the method's weights to the segmentor once; the method refuses an unfit backbone."""
    backbone, head = model.get_submodule("backbone"), model.get_submodule("sem_seg_head")
    if not method.adds or getattr(backbone, "attached", False):
        return
    device = next(backbone.parameters()).device
    # On the meta device the method builds them there, so that they take no memory. Elsewhere the
    # default device must not be a GPU: peft would fill its tensors from a CPU generator, and fail.
    with device if device.type == "meta" else nullcontext():
        method.attach(backbone, head)
    _move_all(backbone, device)
    _move_all(head, device)
    backbone.attached = True  # type: ignore[assignment]  # torch types attributes as tensors


def planned_share(cfg: CfgNode, progress: float = 1.0) -> float:
    """The share that a selective method tunes at a point of the tuning stage, as a config plans."""
    tuning = cfg.TUNING
    schedule = build_tuning_method(cfg).schedule or tuning.SCHEDULE
    return tuned_share(progress, tuning.D_MIN, tuning.D_MAX, schedule=schedule)


def units_of(cfg: CfgNode, method: TuningMethod, backbone: nn.Module) -> Units:
    """The units that a method selects among; refuses a TUNING.UNIT that the backbone lacks."""
    shapes = {name: tuple(p.shape) for name, p in method.parameters(backbone).items()}
    try:
        return Units(cfg.TUNING.UNIT, shapes)
    except ValueError as error:
        raise ValueError(f"TUNING.UNIT {cfg.TUNING.UNIT}: {error}") from error


def build_estimation(
    cfg: CfgNode,
    method: TuningMethod,
    backbone: nn.Module,
    estimate: Callable[[], FisherEstimate | None],
) -> FisherEstimation | None:
    """Builds the hook that estimates and selects; None for a method that selects nothing."""
    if not method.selects:
        return None
    units = units_of(cfg, method, backbone)
    return FisherEstimation(
        estimate,
        # Only a method that does not estimate gets None, and its signature allows that.
        lambda found: method.unit_scores(backbone, found, units),  # type: ignore[arg-type]
        start=cfg.TUNING.WARMUP_ITERS,
        share=planned_share(cfg),
        base=sum(p.numel() for p in backbone.parameters()),
        output_dir=cfg.OUTPUT_DIR,
        eps=cfg.FISHER.EPS,
        units=units,
        allocation=cfg.TUNING.ALLOCATION,
        steps=cfg.TUNING.STEPS,
    )


def build_mask(
    cfg: CfgNode, method: TuningMethod, selected: Callable[[], SelectedWeights | None]
) -> ParameterMask:
    """Builds the hook that lets the selected weights move, more and more of them.

    Args:
        cfg: the config of the run.
        method: a method that selects weights.
        selected: returns the selected weights, once the tuning stage has begun.

    Returns:
        The hook.
    """

    def of_tuning_stage() -> SelectedWeights:
        weights = selected()
        assert weights is not None
        return weights

    tuning = cfg.TUNING
    return ParameterMask(
        of_tuning_stage,
        start=tuning.WARMUP_ITERS,
        iters=cfg.SOLVER.MAX_ITER - tuning.WARMUP_ITERS,
        d_min=tuning.D_MIN,
        d_max=tuning.D_MAX,
        schedule=method.schedule or tuning.SCHEDULE,
    )


def prepare_stage(
    model: nn.Module,
    stage: str,
    method: TuningMethod,
    selection: Selection | None,
) -> tuple[list[nn.Parameter], SelectedWeights | None]:
    """Lets the parameters that a stage trains require a gradient, and no others.

    ``"warmup"`` trains the decoder alone, ``"tuning"`` also the method's parameters: it adds them
    now, or selects them by ``selection``. Weights that the method adds to the head train like the
    rest of the decoder, and ``Frozen`` parts never train. Earlier gradients are freed.

    Returns:
        The trained backbone parameters, and the ``SelectedWeights`` (None unless the method
        selects).

    Raises:
        ValueError: if there is no such stage.
        RuntimeError: if the method selects weights and none are selected yet.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: choose from {STAGES}")
    tuned: list[nn.Parameter] = []
    selected = None
    if stage == "tuning":
        attach(model, method)
        backbone = model.get_submodule("backbone")
        if method.selects:
            if selection is None:
                raise RuntimeError(
                    "no weights are selected yet: the estimation hook does that first"
                )
            selected = SelectedWeights(backbone, selection)
            tuned = list(selected.parameters().values())
        else:
            tuned = list(method.parameters(backbone).values())
    trained = {p for name, p in model.named_parameters() if not is_backbone(name)} | {*tuned}
    trained -= frozen_parameters(model)
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
        parameter.grad = None
    return tuned, selected


def build_average(cfg: CfgNode, selected: Callable[[], SelectedWeights | None]) -> WeightAverage:
    """The hook that averages the weights of the tuning stage, if SOLVER.EMA asks for it."""
    start = max(cfg.TUNING.WARMUP_ITERS, cfg.SOLVER.EMA_START)
    return WeightAverage(cfg.SOLVER.EMA, start, selected)


def build_weight_decay(cfg: CfgNode) -> WeightDecay | None:
    """The hook that lowers the weight decay; None unless SOLVER.WEIGHT_DECAY_END asks for it."""
    solver, start = cfg.SOLVER, cfg.TUNING.WARMUP_ITERS
    if solver.WEIGHT_DECAY_END is None:
        return None
    end = solver.WEIGHT_DECAY_END / solver.WEIGHT_DECAY
    return WeightDecay(start, solver.MAX_ITER - start, end)


def _move_all(module: nn.Module, device: torch.device) -> None:
    """Moves tensors from other devices; parameters that are on this one stay the same objects."""
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.device != device for tensor in own):
            part.to(device)
