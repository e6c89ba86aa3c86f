"""Switches activation checkpoints off during an estimate.

The backward pass computes a checkpointed block a second time. By then the shift of Eq. 6 and the
functions that catch a layer's input are gone, so the second pass would differ from the first.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

# Names of the flag of a module that checkpoints its blocks: timm's, transformers'.
_FLAGS = ("grad_checkpointing", "gradient_checkpointing")
# Detectron2's ViT wraps its blocks with this package.
_FAIRSCALE = "fairscale.nn.checkpoint.checkpoint_activations"


@contextmanager
def keeping_activations(model: nn.Module) -> Iterator[None]:
    """Switches off the checkpoints of timm, transformers and fairscale; refuses other kinds."""
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
    """The gradient of each parameter, in order; None where the loss does not depend on one."""
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    if any(gradient is None for gradient in gradients):
        seen: set[Node | None] = {None}
        waiting = {loss.grad_fn}
        while new := [node for node in waiting - seen if node is not None]:
            # A checkpoint may hide that the loss depends on a parameter.
            if any("Checkpoint" in node.name() for node in new):
                raise RuntimeError("a reentrant checkpoint keeps no graph of its block")
            seen.update(new)
            waiting = {following for node in new for following, _ in node.next_functions}
    return list(gradients)
