"""What each stage of training trains, in one place for the trainer and the plan."""

from contextlib import nullcontext

import torch
from torch import nn

from fishertune_d2.fisher import Selection
from fishertune_d2.tuning import SelectedWeights, TuningMethod

from .optimizer import is_backbone

STAGES = ("warmup", "tuning")


def attach(model: nn.Module, method: TuningMethod) -> None:
    """Adds what ``method`` adds to the segmentor, unless that is there already.

    What the method makes on the CPU is moved to the segmentor's device. On the meta device nothing
    is made elsewhere, so that no memory is taken.

    Args:
        model: the segmentor, without DDP wrapper.
        method: the tuning method.

    Raises:
        ValueError: if the method does not work on the segmentor's backbone.
    """
    backbone = model.backbone
    if not method.adds or getattr(backbone, "attached", False):
        return
    device = next(backbone.parameters()).device
    # Where a GPU is the default device, peft fills GPU tensors from a CPU generator, which fails.
    with device if device.type == "meta" else nullcontext():
        method.attach(backbone, model.sem_seg_head)
    _move_all(backbone, device)
    _move_all(model.sem_seg_head, device)
    backbone.attached = True


def prepare_stage(
    model: nn.Module, stage: str, method: TuningMethod, selection: Selection | None
) -> tuple[list[nn.Parameter], SelectedWeights | None]:
    """Lets what a stage trains require a gradient, and nothing else; frees earlier gradients.

    What the method adds is attached when tuning begins; its part in the head is trained as the rest
    of the decoder is.

    Args:
        model: the segmentor, without DDP wrapper.
        stage: ``"warmup"``, the decoder alone; ``"tuning"``, also what ``method`` trains.
        method: the tuning method.
        selection: what is tuned, if ``method`` selects.

    Returns:
        What of the backbone is trained, and what makes it trainable if it is a selection.

    Raises:
        ValueError: if there is no such stage, or the method does not work on this backbone.
        RuntimeError: if the method selects weights and none are selected yet.
    """
    if stage not in STAGES:
        raise ValueError(f"unknown stage {stage!r}: choose from {STAGES}")
    tuned, selected = [], None
    if stage == "tuning":
        attach(model, method)
    if stage == "tuning" and not method.selects:
        tuned = list(method.parameters(model.backbone).values())
    elif stage == "tuning":
        if selection is None:
            raise RuntimeError("no weights are selected yet: the estimation hook does that first")
        selected = SelectedWeights(model.backbone, selection)
        tuned = list(selected.parameters().values())
    trained = {p for name, p in model.named_parameters() if not is_backbone(name)} | {*tuned}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter in trained)
        parameter.grad = None
    return tuned, selected


def _move_all(module: nn.Module, device: torch.device) -> None:
    """Moves what lies elsewhere, and leaves the parameters that are there as the same objects."""
    for part in module.modules():
        own = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        if any(tensor.device != device for tensor in own):
            part.to(device)
