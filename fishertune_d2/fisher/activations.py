"""Activation checkpoints, which an estimate does without.

A checkpointed block is computed a second time in the backward pass. By then the shift of Eq. 6 and
the functions that catch a layer's input are gone, so the second pass would differ from the first.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn

# What timm and transformers call the flag of a module that checkpoints its blocks.
_FLAGS = ("grad_checkpointing", "gradient_checkpointing")
# Detectron2's ViT wraps its blocks with this package.
_FAIRSCALE = "fairscale.nn.checkpoint.checkpoint_activations"


@contextmanager
def keeping_activations(model: nn.Module) -> Iterator[None]:
    """Switches activation checkpointing off meanwhile, and puts it back.

    Args:
        model: holds timm's or transformers' modules, or modules that fairscale has wrapped.

    Raises:
        ValueError: if a backward pass meets a checkpoint of another kind.
    """
    switched = [
        (module, flag) for module in model.modules() for flag in _FLAGS if vars(module).get(flag)
    ]
    fairscale = sys.modules.get(_FAIRSCALE)
    for module, flag in switched:
        setattr(module, flag, False)
    try:
        with fairscale.disable_checkpointing() if fairscale else nullcontext():
            yield
    except RuntimeError as error:
        if "checkpoint" not in str(error).lower():
            raise
        raise ValueError(
            f"{type(model).__name__} checkpoints activations in a way that the estimate of F "
            f"cannot switch off: build it without, or let it read a flag {_FLAGS[0]!r} of its "
            "modules, which is False during the estimate"
        ) from error
    finally:
        for module, flag in switched:
            setattr(module, flag, True)


def gradients_of(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> list[Tensor | None]:
    """The gradient of each parameter, or None for one that the loss does not reach.

    Args:
        loss: a scalar, with its graph.
        parameters: by name.

    Raises:
        RuntimeError: if the loss may reach one through a checkpoint, which hides that.
    """
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    if any(gradient is None for gradient in gradients):
        seen, waiting = {None}, {loss.grad_fn}
        while waiting := waiting - seen:
            if any("Checkpoint" in node.name() for node in waiting):
                raise RuntimeError("a reentrant checkpoint keeps no graph of its block")
            seen |= waiting
            waiting = {following for node in waiting for following, _ in node.next_functions}
    return list(gradients)
