"""The selected entries of a model's weights as the only trainable parameters.

A dense mask pays for a full update: dense gradients, two dense moments, a dense all-reduce. Here
each tensor with a selected entry gets a vector of those entries' values, which is what the
optimizer holds. The dense weight itself is frozen. After each step of the optimizer the values are
written into it. In the backward pass its gradient, which lives only until then, gives its selected
entries to the vector. The model computes what it always did.

A GPU is given two operators for each tensor in a step: one picks the entries of a gradient, one
writes the values. Everything else happens on all vectors at once, see :mod:`.selected_values`.
"""

import weakref
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)

from fishertune_d2.fisher import Selection

from .masked_update import require_same_shapes
from .selected_values import SelectedValues


class SelectedWeights:
    """Trains the selected entries of ``model`` through one vector for each tensor.

    Optimizers, gradient scalers, clipping, averaging and DistributedDataParallel, when they are
    given the model after this, see the vectors in place of the tensors. The state dict keeps the
    names and tensors of the plain model, in both directions, so that a checkpoint fits either.

    Entries beyond the share that :meth:`grow` was last given have a gradient of zero, and whatever
    the optimizer does to their values (weight decay does) never reaches the model.

    The weights follow the vectors when a ``torch.optim.Optimizer`` that holds these has stepped.
    What changes a vector in another way reaches its weight when that is read next, unless
    ``torch.compile`` has compiled the model.

    Args:
        model: its parameters named in ``selection`` are frozen; those of which an entry is selected
            become attributes computed from the vectors (``torch.nn.utils.parametrize``).
        selection: the ranked choice, by the model's parameter names.

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
        # They get the names and no entries, for a copy of the model has entries of its own.
        self._hooks = [
            model.register_state_dict_post_hook(partial(_save_plain, self.names)),
            model.register_load_state_dict_pre_hook(partial(_load_plain, self.names)),
        ]
        self._write_after_steps()

    def parameters(self) -> dict[str, nn.Parameter]:
        """The vectors, by the name of the parameter that each selects from; each of shape (n,)."""
        return {name: _entries(self.model, name)[0].values for name in self.names}

    def extra_tensors(self) -> list[Tensor]:
        """Tensors that are held beside the model's as long as the share grows."""
        return [tensor for values in self._values for tensor in values.extra_tensors()]

    def grow(self, share: float) -> int:
        """Selects up to ``share`` of the selection's base; what was selected stays.

        Returns:
            How many entries are selected now.
        """
        count = self.selection.count(share)
        return sum(values.grow(count) for values in self._values)

    def release(self) -> None:
        """Leaves the plain model, with the trained weights in it and nothing else."""
        for hook in self._hooks:
            hook.remove()
        for values in self._values:
            values.write()
        for name in self.names:
            parametrize.remove_parametrizations(*_owner(self.model, name), leave_parametrized=False)
        self.names, self._values = [], []

    def _write_after_steps(self) -> None:
        """Writes the values after a step of whichever optimizer holds them.

        An optimizer's step may be called within another's of the same object (Detectron2's clipping
        does), and fused ones change no version counter. So the step's beginning is remembered.
        """
        for values in self._values:
            # The hooks are torch's for all optimizers: they must not keep the model alive.
            own = weakref.ref(values)
            before = register_optimizer_step_pre_hook(partial(_expect_step, own))
            after = register_optimizer_step_post_hook(partial(_write_step, own))
            self._hooks += [before, after]
            weakref.finalize(values, before.remove)
            weakref.finalize(values, after.remove)


class _Entries(nn.Module):
    """Computes a weight from its frozen dense tensor and the values of its selected entries.

    Args:
        shared: all values of the model.
        place: where these lie among them.
        index: (n,), where they are in the flattened dense tensor, best first; int64.

    Attributes:
        values: (n,), a part of ``shared.flat``.
        active: the first ``active`` values count.
        written: the version of ``values`` that is in the dense tensor.
    """

    def __init__(self, shared: SelectedValues, place: slice, index: Tensor):
        super().__init__()
        self.shared, self.place = shared, place
        self.register_buffer("index", index, persistent=False)
        self.values = nn.Parameter(shared.flat[place])
        self.active = 0
        self.written = self.values._version

    def forward(self, dense: Tensor) -> Tensor:
        compiling = torch.compiler.is_compiling()
        # An optimizer's step was followed by a write. This is for what else changes values.
        if not compiling and self.values._version != self.written:
            self.shared.write()
        if not torch.is_grad_enabled():
            return dense
        index = self.index[: self.active]
        if compiling:  # which cannot follow the buffer that the gradients share
            return _SelectedGradient.apply(self.values, dense, index)
        return _SharedGradient.apply(self.values, dense, index, self)


class _SelectedGradient(torch.autograd.Function):
    """A dense weight as it is; of its gradient, the selected entries go to their values."""

    @staticmethod
    def forward(ctx, values: Tensor, dense: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(values)
        return dense.view_as(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        selected = gradient.new_zeros(ctx.count)
        selected[: len(index)] = gradient.reshape(-1).index_select(0, index)
        return selected, None, None


class _SharedGradient(torch.autograd.Function):
    """The same by one operator, into a buffer of zeros that all tensors share."""

    @staticmethod
    def forward(ctx, values: Tensor, dense: Tensor, index: Tensor, entries: _Entries) -> Tensor:
        ctx.save_for_backward(index)
        ctx.entries = entries
        return dense.view_as(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        selected = ctx.entries.shared.gradient_of(ctx.entries.place, gradient)
        if len(index):
            torch.index_select(gradient.reshape(-1), 0, index, out=selected[: len(index)])
        return selected, None, None, None


def _parametrize(model: nn.Module, selection: Selection, names: Sequence[str]) -> SelectedValues:
    """Makes parameters of one dtype and device attributes that are computed from their vectors."""
    parameters = [model.get_parameter(name) for name in names]
    index = [selection.indices[n].to(p.device) for n, p in zip(names, parameters, strict=True)]
    flat = torch.cat([p.detach().view(-1)[i] for p, i in zip(parameters, index, strict=True)])
    shared = SelectedValues(flat, [selection.ranks[name] for name in names])
    start = 0
    for name, each in zip(names, index, strict=True):
        owner, attribute = _owner(model, name)
        entries = _Entries(shared, slice(start, start + len(each)), each)
        start += len(each)
        parametrize.register_parametrization(owner, attribute, entries, unsafe=True)
        shared.tensors.append(owner.parametrizations[attribute])
    return shared


def _expect_step(values: weakref.ref, optimizer: torch.optim.Optimizer, *_) -> None:
    values = values()
    if values is not None and values.held_by(optimizer):
        values.stepping = True


def _write_step(values: weakref.ref, *_) -> None:
    values = values()
    if values is not None and values.stepping:
        values.write()


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter, and the attribute that it is there."""
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _entries(model: nn.Module, name: str) -> tuple[_Entries, nn.Parameter]:
    """The entries of a parameter, and the dense tensor."""
    owner, attribute = _owner(model, name)
    parametrizations = owner.parametrizations[attribute]
    return parametrizations[0], parametrizations.original


def _parametrized_names(name: str) -> tuple[str, str]:
    """What parametrize calls the dense tensor and the values in a state dict."""
    path, dot, attribute = name.rpartition(".")
    inside = f"{path}{dot}parametrizations.{attribute}"
    return f"{inside}.original", f"{inside}.0.values"


def _save_plain(names: Sequence[str], model: nn.Module, state: dict, prefix: str, _) -> None:
    for name in names:
        entries = _entries(model, name)[0]
        if entries.values._version != entries.written:
            entries.shared.write()
        dense_name, values_name = _parametrized_names(prefix + name)
        state[prefix + name] = state.pop(dense_name)
        del state[values_name]


def _load_plain(names: Sequence[str], model: nn.Module, state: dict, prefix: str, *_) -> None:
    for name in names:
        if prefix + name in state:
            index = _entries(model, name)[0].index
            dense_name, values_name = _parametrized_names(prefix + name)
            state[dense_name] = state.pop(prefix + name)
            state[values_name] = state[dense_name].to(index.device).view(-1)[index]
