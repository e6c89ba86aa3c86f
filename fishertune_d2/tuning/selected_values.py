"""The values of all selected slices, contiguous in memory, and the weights that they are part of.

One operator on the contiguous memory updates all values, however many tensors they come from. A
slice is a row, a column or a single entry of a tensor, see :class:`fishertune_d2.fisher.Slices`.
"""

import math
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from fishertune_d2.fisher import Slices, entries_within, slices_of


class SelectedValues:
    """The values of the selected slices of a model's tensors of one dtype and device.

    Values that are not selected yet are restored after each step of the optimizer: weight decay
    moves them, and they must equal the tensor's numbers when they join.

    Args:
        tensors: the dense tensors.
        slices: the selected slices of each, which are not empty.

    Attributes:
        flat: the values, tensor by tensor, each best first; (N,).
        tensors: for each tensor its parametrization, which holds the dense tensor and the
            :class:`Entries`, whose values are a part of ``flat``. The caller adds them.
        stepping: whether an optimizer that holds the values is in its step.
    """

    def __init__(self, tensors: Sequence[Tensor], slices: Sequence[Slices]):
        parts = [
            slices_of(tensor.detach(), each.dim)[each.index.to(tensor.device)].flatten()
            for tensor, each in zip(tensors, slices, strict=True)
        ]
        self.flat = torch.cat(parts)
        self.ranks = [each.ranks for each in slices]
        self.tensors: list[ParametrizationList] = []
        self.stepping = False
        self._count: float = 0
        # The ranks decide which values are selected yet; the start values are the dense tensors'
        # numbers at these versions. int32 halves the memory; no ViT has 2^31 entries.
        ranks = [
            each.repeat_interleave(len(part) // len(each))
            for each, part in zip(self.ranks, parts, strict=True)
        ]
        self._rank: Tensor | None = torch.cat(ranks).to(self.flat.device, torch.int32)
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

    def grow(self, count: int | None) -> int:
        """Selects the units of a rank below ``count``, or all; returns the number of weights."""
        if count is None or count > self._count:
            self._write_changes()
            for (entries, _), ranks in zip(self.pairs(), self.ranks, strict=True):
                entries.active = len(ranks) if count is None else entries_within(ranks, count)
            self._count = math.inf if count is None else count
        return sum(entries.active * entries.width for entries, _ in self.pairs())

    def begin_step(self) -> None:
        """Expects a step; writes other changes of the values before, which are not scaled."""
        if not self.stepping:
            self._write_changes()
        self.stepping = True

    @torch.no_grad()
    def write(self) -> None:
        """Writes the selected values into the dense tensors, and restores the others."""
        if self.stepping:
            for entries, original in self.pairs():
                entries.scale_step(original)
        self.stepping = False
        if self._rank is not None:
            self._restore(self._rank)
        for entries, original in self.pairs():
            # Not through .data: a backward pass that still needs the old numbers must fail.
            slices = slices_of(original, entries.dim)
            if entries.active:
                values = entries.values.data[: entries.active * entries.width]
                values = values.view(-1, *slices.shape[1:])
                slices.index_copy_(0, entries.index[: entries.active], values)
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

    def _write_changes(self) -> None:
        if any(entries.values._version != entries.written for entries, _ in self.pairs()):
            self.write()

    def _restore(self, rank: Tensor) -> None:
        """Sets values that are not selected yet to the numbers in their dense tensors."""
        if all(entries.active == len(entries.index) for entries, _ in self.pairs()):
            self._rank = self._start = None
            return
        rank = self._make_contiguous(rank)
        # The versions differ after a checkpoint was loaded.
        if self._start is None or self._versions_now() != self._versions:
            self._start = torch.cat([entries.read(original) for entries, original in self.pairs()])
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
    """Computes a weight from its frozen dense tensor and the values of its selected slices.

    Args:
        shared: all values of tensors of this dtype and device.
        place: the place of these values in ``shared.flat``.
        dim: the dimension of the slices; None for single entries.
        index: (n,), which slices are selected, best first; int64.
        steps: (n,), a factor on the optimizer's step of each; None for 1.

    Attributes:
        values: (n * width,), a part of ``shared.flat``.
        width: the number of values in a slice.
        active: the number of slices that are selected by now, which come first.
        written: the version of ``values`` that is in the dense tensor.
    """

    index: Tensor
    steps: Tensor | None

    def __init__(
        self,
        shared: SelectedValues,
        place: slice,
        dim: int | None,
        index: Tensor,
        steps: Tensor | None,
    ):
        super().__init__()
        self.shared, self.place, self.dim = shared, place, dim
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("steps", steps, persistent=False)
        self.values = nn.Parameter(shared.flat[place])
        self.width = len(self.values) // len(index)
        self.active = 0
        self.written = self.values._version

    def forward(self, dense: Tensor) -> Tensor:
        """Returns the dense tensor; its gradient goes to the selected values."""
        dense = self.current(dense)
        if not torch.is_grad_enabled():
            return dense
        return _SelectedGradient.apply(dense, self.values, self.dim, *self.selected())

    def of_output(self, output: Tensor, input: Tensor) -> Tensor:
        """Returns the output of a linear layer with this weight; its gradient goes to the values.

        The product of the output's gradient and the input is computed for the selected rows or
        columns alone.

        Args:
            output: (..., out), computed with the dense tensor.
            input: (..., in).

        Returns:
            The output, (..., out).
        """
        if not torch.is_grad_enabled():
            return output
        return _SelectedProduct.apply(output, input, self.values, self.dim, *self.selected())

    def current(self, dense: Tensor) -> Tensor:
        """The dense tensor after all changes of the values are written into it."""
        # An optimizer's step was followed by a write. Other changes of the values are written here.
        if not torch.compiler.is_compiling() and self.values._version != self.written:
            self.shared.write()
        return dense

    def read(self, dense: Tensor) -> Tensor:
        """The numbers of the selected slices in the dense tensor, (n * width,)."""
        return slices_of(dense, self.dim)[self.index].flatten()

    def scale_step(self, dense: Tensor) -> None:
        """Multiplies the step from the dense tensor to the values by its factors."""
        if self.steps is not None:
            before, values = self.read(dense).view(len(self.index), -1), self.values.data
            values = values.view_as(before)
            torch.lerp(before, values, self.steps[:, None], out=values)

    def selected(self) -> tuple[Tensor, "Entries | None"]:
        """The slices that are selected by now, and these entries unless they are compiled."""
        # torch.compile cannot trace the shared buffer of gradients.
        compiling = torch.compiler.is_compiling()
        return self.index[: self.active], None if compiling else self


class _SelectedGradient(torch.autograd.Function):
    """The identity on a dense weight; the selected slices of its gradient go to their values."""

    @staticmethod
    def forward(
        ctx, dense: Tensor, values: Tensor, dim: int | None, index: Tensor, entries: Entries | None
    ) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count, ctx.entries, ctx.dim = len(values), entries, dim
        return dense.view_as(dense)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[None, Tensor, None, None, None]:
        (index,) = ctx.saved_tensors
        whole, slices = _zeros(ctx, gradient), slices_of(gradient.contiguous(), ctx.dim)
        if len(index):  # one operator, into a buffer of zeros that all tensors share
            out = whole[: len(index) * slices[0].numel()].view(-1, *slices.shape[1:])
            torch.index_select(slices, 0, index, out=out)
        return None, whole, None, None, None


class _SelectedProduct(torch.autograd.Function):
    """The identity on a layer's output; the values get the gradient of rows or columns alone."""

    @staticmethod
    def forward(
        ctx,
        output: Tensor,
        input: Tensor,
        values: Tensor,
        dim: int,
        index: Tensor,
        entries: Entries | None,
    ) -> Tensor:
        # Of the input, only what the product needs, in the precision that the layer computed in.
        needed = input if dim == 0 and len(index) else input.index_select(-1, index)
        ctx.save_for_backward(needed.to(output.dtype), index)
        ctx.count, ctx.entries, ctx.dim, ctx.like = len(values), entries, dim, values.dtype
        return output.detach()  # not a view: operators in place, as of an activation, may follow

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None, Tensor, None, None, None]:
        input, index = ctx.saved_tensors
        whole = _zeros(ctx, gradient.new_empty(0, dtype=ctx.like))
        if len(index):
            chosen = gradient.index_select(-1, index) if ctx.dim == 0 else gradient
            rows, columns = (each.reshape(-1, each.shape[-1]) for each in (chosen, input))
            if ctx.dim == 1:
                rows, columns = columns, rows
            out = whole[: rows.shape[1] * columns.shape[1]].view(rows.shape[1], columns.shape[1])
            if out.dtype == rows.dtype:
                torch.mm(rows.T, columns, out=out)
            else:
                out.copy_(rows.T @ columns)
        return gradient, None, whole, None, None, None


def _zeros(ctx, like: Tensor) -> Tensor:
    """Zeros, (n,), for the gradient of all values of a tensor."""
    if ctx.entries is None:
        return like.new_zeros(ctx.count)
    return ctx.entries.shared.gradient_of(ctx.entries.place, like)
