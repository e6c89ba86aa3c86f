"""Makes the selected slices of a model's weights its only trainable parameters.

A dense mask costs as much as a full update: dense gradients, two dense moments, a dense all-reduce.
Here each tensor with a selected slice gets a vector of the values of these slices. A slice is a
single entry, or a row or a column that belongs to a neuron. The optimizer holds the vectors, and
the dense weights are frozen. After each step of the optimizer the values are written into the
dense weight. The model's computation does not change.

The backward pass copies selected entries of a dense gradient to the vector and frees the rest. Of a
linear layer with selected rows or columns it computes only their gradients, and of the layer's
input it keeps only what these need.

A step launches two operators for each tensor: one gets the gradient, one writes the values.
Everything else runs on all vectors at once, see :mod:`.selected_values`.
"""

import weakref
from collections.abc import Mapping, Sequence
from functools import partial
from types import MethodType
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fishertune_d2.fisher import Selection, Slices, slices_of

from .masked_update import require_same_shapes
from .selected_values import Entries, SelectedValues


class SelectedWeights:
    """Trains the selected slices of ``model`` through one vector for each tensor.

    Optimizers, gradient scalers, clipping, averaging and DistributedDataParallel that get the model
    afterwards see the vectors in place of the tensors. Saving and loading a state dict use the
    names and tensors of the plain model, so that a checkpoint fits both.

    Slices beyond the share of the last :meth:`grow` have a gradient of zero, and changes of their
    values by the optimizer (weight decay) never reach the model.

    A step of a ``torch.optim.Optimizer`` that holds the vectors updates the weights. Any other
    change of a vector reaches its weight when that is read next, unless ``torch.compile`` has
    compiled the model.

    Args:
        model: its parameters named in ``selection`` are frozen. Those with a selected entry become
            attributes computed from the vectors (``torch.nn.utils.parametrize``).
        selection: by the model's parameter names. Its ``steps`` scale those of the optimizer.

    Raises:
        ValueError: if a name or shape does not fit the selection, or two modules share a parameter.
    """

    def __init__(self, model: nn.Module, selection: Selection):
        parameters = {n: p for n, p in model.named_parameters() if n in selection.shapes}
        require_same_shapes(parameters, selection)
        _require_unshared(model, parameters)
        self.model = model
        self.selection = selection
        self._order = list(dict(model.named_parameters()))
        slices = {name: selection.slices(name) for name in parameters}
        self.names = [name for name in parameters if len(slices[name].index) > 0]
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name in self.names:
            alike.setdefault((parameters[name].dtype, parameters[name].device), []).append(name)
        self._values = [
            _parametrize(model, {name: slices[name] for name in names}) for names in alike.values()
        ]
        # The hooks get names, not entries, because a copy of the model has its own entries.
        self._hooks = [
            model.register_state_dict_post_hook(partial(_save_plain, self.names)),
            model.register_load_state_dict_pre_hook(partial(_load_plain, self.names)),
        ]
        self._write_after_steps()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The vectors, by the name of the parameter that each selects from; each of shape (n,)."""
        return {name: _entries(self.model, name).values for name in self.names}

    def extra_tensors(self) -> list[Tensor]:
        """The tensors beside the model's that exist while the share grows."""
        return [tensor for values in self._values for tensor in values.extra_tensors()]

    def grow(self, share: float) -> int:
        """Selects up to a share of the base, beside earlier units; returns how many weights."""
        whole = share == self.selection.share
        count = None if whole else self.selection.count(share)
        return sum(values.grow(count) for values in self._values)

    def release(self) -> None:
        """Restores the plain model, with the trained weights in it."""
        for hook in self._hooks:
            hook.remove()
        for values in self._values:
            values.write()
        for name in self.names:
            owner, attribute = _owner(self.model, name)
            if getattr(owner.forward, "__func__", None) is _linear:
                del owner.forward
            parametrize.remove_parametrizations(owner, attribute, leave_parametrized=False)
        for name in self._order:  # because each was registered last in its module
            owner, attribute = _owner(self.model, name)
            parameter = owner.get_parameter(attribute)
            delattr(owner, attribute)
            owner.register_parameter(attribute, parameter)
        self.names, self._values = [], []

    def _write_after_steps(self) -> None:
        """Writes the values after each step of an optimizer that holds them.

        A step may call another step of the same optimizer (Detectron2's clipping does), and fused
        steps change no version counter. So the hook before a step sets a flag.
        """
        for values in self._values:
            # torch calls these hooks for all optimizers, so they must not keep the model alive.
            own = weakref.ref(values)
            before = register_optimizer_step_pre_hook(partial(_expect_step, own))
            after = register_optimizer_step_post_hook(partial(_write_step, own))
            self._hooks += [before, after]
            weakref.finalize(values, before.remove)
            weakref.finalize(values, after.remove)


def _require_unshared(model: nn.Module, parameters: Mapping[str, nn.Parameter]) -> None:
    """Refuses parameters of two modules: in the second, the vector would get no gradient."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    for other, parameter in model.named_parameters(remove_duplicate=False):
        name = names.get(id(parameter))
        if name is not None and _owner(model, name) != _owner(model, other):
            raise ValueError(
                f"{name} is also {other}, and weights that two modules share cannot be trained "
                "in part by SelectedWeights: use MaskedUpdate"
            )


def _parametrize(model: nn.Module, slices: Mapping[str, Slices]) -> SelectedValues:
    """Parametrizes parameters of one dtype and device by vectors of their selected values."""
    parameters = [model.get_parameter(name) for name in slices]
    shared = SelectedValues(parameters, list(slices.values()))
    start = 0
    for (name, each), parameter in zip(slices.items(), parameters, strict=True):
        width = slices_of(parameter.detach(), each.dim)[0].numel()
        place = slice(start, start + width * len(each.index))
        start = place.stop
        owner, attribute = _owner(model, name)
        steps = None if each.steps is None else each.steps.to(parameter)
        entries = Entries(shared, place, each.dim, each.index.to(parameter.device), steps)
        # A layer with another forward pass, or a weight that others read, takes the dense gradient.
        forward = getattr(owner.forward, "__func__", None)
        is_product = attribute == "weight" and forward is nn.Linear.forward
        parametrize.register_parametrization(owner, attribute, entries, unsafe=True)
        if each.dim is not None and is_product:
            owner.forward = MethodType(_linear, owner)  # type: ignore[method-assign]
        shared.tensors.append(_parametrization(model, name))
    return shared


def _linear(self: nn.Linear, input: Tensor) -> Tensor:
    """The forward pass of a linear layer with selected rows or columns."""
    found = cast(parametrize.ParametrizationList, self.get_submodule("parametrizations.weight"))
    entries = cast(Entries, found[0])
    weight = entries.current(cast(nn.Parameter, found.original))
    return entries.of_output(F.linear(input, weight, self.bias), input)


def _expect_step(values: weakref.ref[SelectedValues], optimizer: torch.optim.Optimizer, *_) -> None:
    alive = values()
    if alive is not None and alive.held_by(optimizer):
        alive.begin_step()


def _write_step(values: weakref.ref[SelectedValues], *_) -> None:
    alive = values()
    if alive is not None and alive.stepping:
        alive.write()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module of a parameter, and the name of its attribute there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _parametrization(model: nn.Module, name: str) -> parametrize.ParametrizationList:
    owner, attribute = _owner(model, name)
    found = owner.get_submodule(f"parametrizations.{attribute}")
    return cast(parametrize.ParametrizationList, found)


def _entries(model: nn.Module, name: str) -> Entries:
    return cast(Entries, _parametrization(model, name)[0])


def _parametrized_names(name: str) -> tuple[str, str]:
    """The names that parametrize gives the dense tensor and the values in a state dict."""
    path, dot, attribute = name.rpartition(".")
    inside = f"{path}{dot}parametrizations.{attribute}"
    return f"{inside}.original", f"{inside}.0.values"


def _save_plain(names: Sequence[str], model: nn.Module, state: dict, prefix: str, _) -> None:
    for name in names:
        entries = _entries(model, name)
        if entries.values._version != entries.written:
            entries.shared.write()
        dense_name, values_name = _parametrized_names(prefix + name)
        state[prefix + name] = state.pop(dense_name)
        del state[values_name]


def _load_plain(names: Sequence[str], model: nn.Module, state: dict, prefix: str, *_) -> None:
    for name in names:
        if prefix + name in state:
            entries = _entries(model, name)
            dense_name, values_name = _parametrized_names(prefix + name)
            state[dense_name] = state.pop(prefix + name)
            state[values_name] = entries.read(state[dense_name].to(entries.index.device))
