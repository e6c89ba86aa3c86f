"""The selected entries of a model's weights as the only trainable parameters.

A dense mask pays for a full update: dense gradients, two dense moments, a dense all-reduce. Here
each tensor with a selected entry gets a vector of those entries' values, which is what the
optimizer holds. The dense weight itself is frozen. Whenever it is read, the values are first
written into it, and in the backward pass its gradient, which lives only until then, gives its
selected entries to the vector. The model computes what it always did.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fishertune_d2.fisher import Selection

from .masked_update import require_same_shapes


class SelectedWeights:
    """Trains the selected entries of ``model`` through one vector for each tensor.

    Optimizers, gradient scalers, clipping, averaging and DistributedDataParallel, when they are
    given the model after this, see the vectors in place of the tensors. The state dict keeps the
    names and tensors of the plain model, in both directions, so that a checkpoint fits either.

    Entries beyond the share that :meth:`grow` was last given have a gradient of zero, and whatever
    the optimizer does to their values (weight decay does) never reaches the model.

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
        for name in self.names:
            owner, attribute = _owner(model, name)
            entries = _Entries(parameters[name], selection.indices[name])
            parametrize.register_parametrization(owner, attribute, entries, unsafe=True)
        # They get the names and no entries, for a copy of the model has entries of its own.
        self._hooks = [
            model.register_state_dict_post_hook(partial(_save_plain, self.names)),
            model.register_load_state_dict_pre_hook(partial(_load_plain, self.names)),
        ]

    def parameters(self) -> dict[str, nn.Parameter]:
        """The vectors, by the name of the parameter that each selects from; each of shape (n,)."""
        return {name: _entries(self.model, name)[0].values for name in self.names}

    def grow(self, share: float) -> int:
        """Selects up to ``share`` of the selection's base; what was selected stays.

        Returns:
            How many entries are selected now.
        """
        selected = 0
        for name in self.names:
            entries, dense = _entries(self.model, name)
            entries.grow(len(self.selection.prefix(name, share)), dense)
            selected += entries.active
        return selected

    def release(self) -> None:
        """Leaves the plain model, with the trained weights in it and nothing else."""
        for hook in self._hooks:
            hook.remove()
        for name in self.names:
            entries, dense = _entries(self.model, name)
            entries.write(dense)
            parametrize.remove_parametrizations(*_owner(self.model, name), leave_parametrized=False)
        self.names = []


class _Entries(nn.Module):
    """Computes a weight from its frozen dense tensor and the values of its selected entries.

    Attributes:
        values: (n,), best first; the first ``active`` of them count.
        index: (n,), where they are in the flattened tensor.
    """

    def __init__(self, dense: Tensor, index: Tensor):
        super().__init__()
        # int32 halves the memory, and no tensor of a ViT has 2^31 entries.
        self.register_buffer("index", index.to(dense.device, torch.int32), persistent=False)
        self.values = nn.Parameter(dense.detach().view(-1)[self.index])
        self.active = 0

    def forward(self, dense: Tensor) -> Tensor:
        self.write(dense)
        if not torch.is_grad_enabled():
            return dense
        return _SelectedGradient.apply(self.values, dense, self.index[: self.active])

    def write(self, dense: Tensor) -> None:
        # Through .data: if autograd has saved the tensor for a backward pass that is still to come,
        # the optimizer has not stepped since, and these are the numbers that are there already.
        dense.data.view(-1)[self.index[: self.active]] = self.values.data[: self.active]

    @torch.no_grad()
    def grow(self, count: int, dense: Tensor) -> None:
        if count > self.active:
            # Weight decay may have moved their values meanwhile.
            joining = slice(self.active, count)
            self.values[joining] = dense.view(-1)[self.index[joining]]
            self.active = count


class _SelectedGradient(torch.autograd.Function):
    """A dense weight as it is; of its gradient, the selected entries go to their values."""

    @staticmethod
    def forward(ctx, values: Tensor, dense: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(values)
        return dense.view_as(dense)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None]:
        (index,) = ctx.saved_tensors
        selected = gradient.new_zeros(ctx.count)
        selected[: len(index)] = gradient.reshape(-1).index_select(0, index)
        return selected, None, None


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
        entries, dense = _entries(model, name)
        entries.write(dense)
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
