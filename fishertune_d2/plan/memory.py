"""Bytes that a stage of training holds, counted on the objects that would hold them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from weakref import WeakSet

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.engine.optimizer import build_optimizer
from fishertune_d2.fisher import Candidate, Cost


@dataclass(frozen=True)
class Memory:
    """What is held at the end of a forward pass, in bytes, where a step holds most.

    The sum is a bound from below: it leaves out what exists for a moment (the batch, the masks of
    the labels, what a backward pass or the optimizer puts between), the allocator's cuts and the
    device's own libraries. Gradients are among it, for Detectron2 frees those of the last step
    only after the next forward pass.

    Attributes:
        weights: the model's, with what its tuning method has added.
        gradients: of what the optimizer holds.
        optimizer: its state.
        activations: what autograd keeps for the backward pass, each storage once.
        fisher: what the estimator gathers F(x) and F(x') in.
        selection: which weights are selected, and what makes them trainable.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    fisher: int = 0
    selection: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return sum(getattr(self, each.name) for each in fields(self))


def held_bytes(value: object) -> int:
    """Bytes of all tensors in nested mappings, sequences and dataclasses, each storage once.

    Parameters do not count, which belong to the model.
    """
    return _bytes(each for each in _tensors(value) if not isinstance(each, nn.Parameter))


def weight_bytes(model: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return _bytes([*model.parameters(), *model.buffers()])


def saved_bytes(model: nn.Module, loss: Callable[[], object]) -> int:
    """Bytes that autograd saves while ``loss`` is computed, but for the model's own."""
    own = {_key(each) for each in [*model.parameters(), *model.buffers()]}
    alive: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if _key(tensor) not in own:
            alive.add(saved)
        return saved

    # The graph of a checkpointed block that has nothing to train is dropped before the end.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        graph = loss()
    total = _bytes(saved.tensor for saved in alive)
    del graph
    return total


class _Saved:
    """What autograd holds in place of a tensor it saved; gone when that would be."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def optimizer_bytes(cfg: CfgNode, model: nn.Module) -> dict[str, int]:
    """Gradients and state of a stage's optimizer, found by making one step of it.

    Args:
        cfg: SOLVER is read.
        model: on the meta device; what the stage trains requires a gradient.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.SOLVER.FUSED = False  # which the meta device does not have; the state is the same
    optimizer = build_optimizer(cfg, model)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    found = {
        "gradients": _bytes(parameter.grad for parameter in trained),
        "optimizer": held_bytes(optimizer.state),
    }
    optimizer.zero_grad()
    return found


def estimator_bytes(cost: Cost, candidates: Sequence[Candidate]) -> int:
    """What F(x) and F(x') are gathered in; the two take turns, so what is extra is there once."""
    parameters = {c.name: c.parameter for c in candidates}
    numbers = sum(parameter.numel() for parameter in parameters.values())
    return 4 * numbers * (2 * cost.kept + cost.extra)


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
    elif is_dataclass(value):
        yield from _tensors(vars(value))


def _bytes(tensors: Iterable[Tensor]) -> int:
    storages = {_key(each): each.untyped_storage() for each in tensors}
    return sum(storage.nbytes() for storage in storages.values())


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
