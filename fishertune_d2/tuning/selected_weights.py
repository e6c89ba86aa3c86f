"""Makes the selected entries of a model's weights its only trainable parameters.

A dense mask costs as much as a full update: dense gradients, two dense moments, a dense all-reduce.
Here each tensor with a selected entry gets a vector of the values of these entries. The optimizer
holds the vectors, and the dense weights are frozen. The backward pass copies the selected entries
of a dense gradient to the vector and frees the rest. After each step of the optimizer the values
are written into the dense weight. The model's computation does not change.

A step launches two operators for each tensor: one picks the entries of a gradient, one writes the
values. Everything else runs on all vectors at once, see :mod:`.selected_values`.
"""

import weakref
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fishertune_d2.fisher import Selection

from .masked_update import require_same_shapes
from .selected_values import Entries, SelectedValues


class SelectedWeights:
    """Trains the selected entries of ``model`` through one vector for each tensor.

    Optimizers, gradient scalers, clipping, averaging and DistributedDataParallel that get the model
    afterwards see the vectors in place of the tensors. Saving and loading a state dict use the
    names and tensors of the plain model, so that a checkpoint fits both.

    Entries beyond the share of the last :meth:`grow` have a gradient of zero, and changes of their
    values by the optimizer (weight decay) never reach the model.

    A step of a ``torch.optim.Optimizer`` that holds the vectors updates the weights. Any other
    change of a vector reaches its weight when that is read next, unless ``torch.compile`` has
    compiled the model.

    Args:
        model: its parameters named in ``selection`` are frozen. Those with a selected entry become
            attributes computed from the vectors (``torch.nn.utils.parametrize``).
        selection: by the model's parameter names.

    Raises:
        ValueError: if a name or shape does not fit the selection.
    """

    def __init__(self, model: nn.Module, selection: Selection):
        parameters = {n: p for n, p in model.named_parameters() if n in selection.shapes}
        require_same_shapes(parameters, selection)
        self.model = model
        self.selection = selection
        self.names = [name for name in parameters if len(selection.indices[name]) > 0]
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        alike: dict[tuple[torch.dtype, torch.device], list[str]] = {}
        for name in self.names:
            alike.setdefault((parameters[name].dtype, parameters[name].device), []).append(name)
        self._values = [_parametrize(model, selection, names) for names in alike.values()]
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
        """Selects up to a share of the base, beside earlier entries; returns how many there are."""
        count = self.selection.count(share)
        return sum(values.grow(count) for values in self._values)

    def release(self) -> None:
        """Restores the plain model, with the trained weights in it."""
        for hook in self._hooks:
            hook.remove()
        for values in self._values:
            values.write()
        for name in self.names:
            parametrize.remove_parametrizations(*_owner(self.model, name), leave_parametrized=False)
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


def _parametrize(model: nn.Module, selection: Selection, names: Sequence[str]) -> SelectedValues:
    """Parametrizes parameters of one dtype and device by vectors of their selected values."""
    parameters = [model.get_parameter(name) for name in names]
    index = [selection.indices[n].to(p.device) for n, p in zip(names, parameters, strict=True)]
    flat = torch.cat([p.detach().view(-1)[i] for p, i in zip(parameters, index, strict=True)])
    shared = SelectedValues(flat, [selection.ranks[name] for name in names])
    start = 0
    for name, each in zip(names, index, strict=True):
        owner, attribute = _owner(model, name)
        entries = Entries(shared, slice(start, start + len(each)), each)
        start += len(each)
        parametrize.register_parametrization(owner, attribute, entries, unsafe=True)
        shared.tensors.append(_parametrization(model, name))
    return shared


def _expect_step(values: weakref.ref[SelectedValues], optimizer: torch.optim.Optimizer, *_) -> None:
    alive = values()
    if alive is not None and alive.held_by(optimizer):
        alive.stepping = True


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
            index = _entries(model, name).index
            dense_name, values_name = _parametrized_names(prefix + name)
            state[dense_name] = state.pop(prefix + name)
            state[values_name] = state[dense_name].to(index.device).view(-1)[index]
