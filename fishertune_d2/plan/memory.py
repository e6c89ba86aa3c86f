"""Bytes that a stage of training holds, counted on the objects that hold them in a run."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from weakref import WeakSet

import torch
from torch import Tensor, nn

from fishertune_d2.fisher import Candidate, Cost
from fishertune_d2.modeling.frozen import fixed_parts


@dataclass(frozen=True)
class Memory:
    """The bytes held at the end of a forward pass, when a step holds most.

    The sum is a lower bound. It leaves out short-lived tensors (the batch, the masks of the labels,
    intermediate results of the backward pass and of the optimizer), the allocator's fragmentation
    and the device's libraries. It includes gradients, because Detectron2 frees those of the last
    step only after the next forward pass.

    Attributes:
        weights: the model's parameters and buffers, those that its tuning method has added, and the
            copy of its public weights that a text head may compare with.
        gradients: the gradients of the parameters that the optimizer updates.
        optimizer: the optimizer's state.
        activations: the tensors that autograd keeps for the backward pass, each storage once.
        fisher: the sums in which the estimator gathers F(x) and F(x').
        selection: the selected indices, and the vectors that make their weights trainable.
        averages: the averages of the trained tensors, with SOLVER.EMA, and the teacher's head.
    """

    weights: int = 0
    gradients: int = 0
    optimizer: int = 0
    activations: int = 0
    fisher: int = 0
    selection: int = 0
    averages: int = 0

    @property
    def total(self) -> int:
        """The sum of all entries."""
        return sum(getattr(self, each.name) for each in fields(self))


def held_bytes(value: object) -> int:
    """Counts the tensors in nested containers and dataclasses, each storage once; no parameters."""
    return _bytes(each for each in _tensors(value) if not isinstance(each, nn.Parameter))


def weight_bytes(model: nn.Module) -> int:
    """Counts parameters and buffers, and those of copies with public weights."""
    return _bytes(_weights(model))


def saved_bytes(model: nn.Module, loss: Callable[[], object]) -> int:
    """Counts the bytes that autograd saves for the backward pass, without the model's weights."""
    own = {_key(each) for each in _weights(model)}
    alive: WeakSet[_Saved] = WeakSet()

    def pack(tensor: Tensor) -> _Saved:
        saved = _Saved(tensor)
        if _key(tensor) not in own:
            alive.add(saved)
        return saved

    # PyTorch drops the graph of a checkpointed block that trains nothing before the pass ends.
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        graph = loss()
    total = _bytes(saved.tensor for saved in alive)
    del graph
    return total


def _weights(model: nn.Module) -> list[Tensor]:
    # A public copy is no part of its module's parameters.
    modules = [model, *fixed_parts(model)]
    return [each for module in modules for each in (*module.parameters(), *module.buffers())]


class _Saved:
    """Stands for a saved tensor; autograd drops it when it would drop the tensor."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Counts the "gradients" and the state of an "optimizer" on the meta device, by one step."""
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in trained:
        parameter.grad = torch.empty_like(parameter)
    optimizer.step()
    gradients = _bytes(parameter.grad for parameter in trained)
    optimizer.zero_grad()
    return {"gradients": gradients, "optimizer": held_bytes(optimizer.state)}


def estimator_bytes(cost: Cost, candidates: Sequence[Candidate]) -> int:
    """Counts the sums of F(x) and F(x'), and the estimator's extra tensors."""
    # Several candidates may be parts of one parameter.
    numbers = sum({c.name: c.parameter.numel() for c in candidates}.values())
    # F(x) and F(x') take turns, so the extra tensors exist once.
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
