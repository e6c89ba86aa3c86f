"""The values of all selected entries, contiguous in memory, and the weights that they are part of.

One operator on the contiguous memory updates all values, however many tensors they come from.
"""

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from fishertune_d2.fisher import entries_within


class SelectedValues:
    """The values of the selected entries of a model's tensors of one dtype and device.

    Values that are not selected yet are restored after each step of the optimizer: weight decay
    moves them, and they must equal the tensor's numbers when they join.

    Args:
        flat: the values, tensor by tensor, each best first; (N,).
        ranks: for each tensor its entries' ranks in the whole selection, ascending; (n,) int64.

    Attributes:
        tensors: for each tensor its parametrization, which holds the dense tensor and the
            :class:`Entries`, whose values are a part of ``flat``.
        stepping: whether an optimizer that holds the values is in its step.
    """

    def __init__(self, flat: Tensor, ranks: list[Tensor]):
        self.flat = flat
        self.ranks = ranks
        self.tensors: list[ParametrizationList] = []
        self.stepping = False
        self._count = 0
        # The ranks decide which values are selected yet; the start values are the dense tensors'
        # numbers at these versions. int32 halves the memory; no ViT has 2^31 entries.
        self._rank: Tensor | None = torch.cat(ranks).to(flat.device, torch.int32)
        self._start: Tensor | None = None
        self._versions: list[int] = []
        # A buffer for gradients, and the starts of its parts that are in use.
        self._gradients: Tensor | None = None
        self._taken: set[int] = set()

    def held_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer moves these values."""
        own = {id(entries.values) for entries, _ in self.pairs()}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def pairs(self) -> Iterator[tuple["Entries", nn.Parameter]]:
        """The entries and the dense tensor of each parametrization."""
        for tensor in self.tensors:
            yield cast(Entries, tensor[0]), cast(nn.Parameter, tensor.original)

    def extra_tensors(self) -> list[Tensor]:
        """The ranks and the values to restore; none once all values are selected."""
        return [tensor for tensor in (self._rank, self._start) if tensor is not None]

    def grow(self, count: int) -> int:
        """Selects the entries of a rank below ``count``; returns how many there are here now."""
        if count > self._count:
            if any(entries.values._version != entries.written for entries, _ in self.pairs()):
                self.write()
            self._count = count
            for (entries, _), ranks in zip(self.pairs(), self.ranks, strict=True):
                entries.active = entries_within(ranks, count)
        return sum(entries.active for entries, _ in self.pairs())

    @torch.no_grad()
    def write(self) -> None:
        """Writes the selected values into the dense tensors, and restores the others."""
        self.stepping = False
        if self._rank is not None:
            self._restore(self._rank)
        for entries, original in self.pairs():
            active = entries.active
            # Not through .data: a backward pass that still needs the old numbers must fail.
            dense, values = original.view(-1), entries.values.data
            if active:
                dense.index_copy_(0, entries.index[:active], values[:active])
            entries.written = entries.values._version
        if self._start is not None:
            self._versions = self._versions_now()

    def gradient_of(self, place: slice, like: Tensor) -> Tensor:
        """Zeros, (n,), for the gradient of the values at ``place``, from a shared buffer."""
        buffer = self._gradients
        fits = buffer is not None and (buffer.dtype, buffer.device) == (like.dtype, like.device)
        # A part in use may be a gradient by now. Such parts keep the old buffer.
        if buffer is None or not fits or place.start in self._taken:
            buffer, self._taken = like.new_zeros(self.flat.shape), set()
        self._taken.add(place.start)
        self._gradients = None if len(self._taken) == len(self.tensors) else buffer
        return buffer[place]

    def _restore(self, rank: Tensor) -> None:
        """Sets values that are not selected yet to the numbers in their dense tensors."""
        if all(entries.active == len(entries.values) for entries, _ in self.pairs()):
            self._rank = self._start = None
            return
        rank = self._make_contiguous(rank)
        # The versions differ after a checkpoint was loaded.
        if self._start is None or self._versions_now() != self._versions:
            parts = [original.view(-1)[entries.index] for entries, original in self.pairs()]
            self._start = torch.cat(parts)
        torch.where(rank < self._count, self.flat, self._start, out=self.flat)

    def _versions_now(self) -> list[int]:
        return [original._version for _, original in self.pairs()]

    def _make_contiguous(self, rank: Tensor) -> Tensor:
        """Makes the values contiguous again after a copy or a move; returns the ranks there."""
        values = [entries.values for entries, _ in self.pairs()]
        storage = self.flat.untyped_storage()._cdata
        if any(each.untyped_storage()._cdata != storage for each in values):
            self.flat = torch.cat([each.data for each in values])
            for each, part in zip(values, self.flat.split([len(v) for v in values]), strict=True):
                each.data = part
            rank, self._start = rank.to(self.flat.device), None
            self._rank = rank
        return rank


class Entries(nn.Module):
    """Computes a weight from its frozen dense tensor and the values of its selected entries.

    Args:
        shared: all values of tensors of this dtype and device.
        place: the place of these values in ``shared.flat``.
        index: (n,), the places of the entries in the flattened dense tensor, best first; int64.

    Attributes:
        values: (n,), a part of ``shared.flat``.
        active: the number of selected values, which come first.
        written: the version of ``values`` that is in the dense tensor.
    """

    index: Tensor

    def __init__(self, shared: SelectedValues, place: slice, index: Tensor):
        super().__init__()
        self.shared, self.place = shared, place
        self.register_buffer("index", index, persistent=False)
        self.values = nn.Parameter(shared.flat[place])
        self.active = 0
        self.written = self.values._version

    def forward(self, dense: Tensor) -> Tensor:
        """Returns the dense tensor; its gradient goes to the selected values."""
        compiling = torch.compiler.is_compiling()
        # An optimizer's step was followed by a write. Other changes of the values are written here.
        if not compiling and self.values._version != self.written:
            self.shared.write()
        if not torch.is_grad_enabled():
            return dense
        # torch.compile cannot trace the shared buffer of gradients.
        entries = None if compiling else self
        return _SelectedGradient.apply(self.values, dense, self.index[: self.active], entries)


class _SelectedGradient(torch.autograd.Function):
    """The identity on a dense weight; the selected entries of its gradient go to their values."""

    @staticmethod
    def forward(
        ctx, values: Tensor, dense: Tensor, index: Tensor, entries: Entries | None
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count, ctx.entries = len(values), entries
        return dense.view_as(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        if ctx.entries is None:
            selected = gradient.new_zeros(ctx.count)
            selected[: len(index)] = gradient.reshape(-1).index_select(0, index)
            return selected, None, None, None
        selected = ctx.entries.shared.gradient_of(ctx.entries.place, gradient)
        if len(index):  # one operator, into a buffer of zeros that all tensors share
            torch.index_select(gradient.reshape(-1), 0, index, out=selected[: len(index)])
        return selected, None, None, None
