"""The parameters that each stage of training trains, for the trainer and the plan."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.fisher import Selection
from fishertune_d2.tuning import SelectedWeights, TuningMethod

from .hooks import ParameterMask
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
    model: nn.Module, stage: str, method: TuningMethod, selection: Selection | None
) -> tuple[list[nn.Parameter], SelectedWeights | None]:
    """Lets the parameters that a stage trains require a gradient, and no others.

    ``"warmup"`` trains the decoder alone, ``"tuning"`` also the method's parameters: it adds them
    now, or selects them by ``selection``. Weights that the method adds to the head train like the
    rest of the decoder. Earlier gradients are freed.

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
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
        parameter.grad = None
    return tuned, selected


def build_average(cfg: CfgNode, selected: Callable[[], SelectedWeights | None]) -> WeightAverage:
    """The hook that averages the weights of the tuning stage, if SOLVER.EMA asks for it."""
    return WeightAverage(cfg.SOLVER.EMA, cfg.TUNING.WARMUP_ITERS, selected)


def _move_all(module: nn.Module, device: torch.device) -> None:
    """Moves tensors from other devices; parameters that are on this one stay the same objects."""
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.device != device for tensor in own):
            part.to(device)
