"""The values of all selected entries, behind one another in memory.

So what happens to every one of them is one operator, however many tensors they come from.
"""

import torch
from torch import Tensor
from torch.nn.utils.parametrize import ParametrizationList
from torch.optim import Optimizer

from fishertune_d2.fisher import entries_within


class SelectedValues:
    """The values of the selected entries of a model's tensors of one dtype and device.

    Values beyond the share that is selected are put back after each step of the optimizer, for
    weight decay moves them, and they must be the tensor's when they join.

    Args:
        flat: the values, tensor by tensor, each best first; (N,).
        ranks: of each tensor its entries' ranks among all of the selection, ascending; (n,) int64.

    Attributes:
        tensors: for each tensor the dense one, ``original``, and its entries, ``[0]``, whose values
            are a part of ``flat``.
        stepping: whether an optimizer that holds the values is in its step.
    """

    def __init__(self, flat: Tensor, ranks: list[Tensor]):
        self.flat = flat
        self.ranks = ranks
        self.tensors: list[ParametrizationList] = []
        self.stepping = False
        self._count = 0
        # The ranks that tell which values count yet, and what the others are: those of the dense
        # tensors when these had the versions. int32 halves the memory; no ViT has 2^31 entries.
        self._rank: Tensor | None = torch.cat(ranks).to(flat.device, torch.int32)
        self._start: Tensor | None = None
        self._versions: list[int] = []
        # A buffer for gradients, and the parts of it that are taken, by where they begin.
        self._gradients: Tensor | None = None
        self._taken: set[int] = set()

    def held_by(self, optimizer: Optimizer) -> bool:
        """Whether an optimizer moves these values."""
        own = {id(tensor[0].values) for tensor in self.tensors}
        return any(id(p) in own for group in optimizer.param_groups for p in group["params"])

    def extra_tensors(self) -> list[Tensor]:
        """The ranks and the values to put back; none once all values count."""
        return [tensor for tensor in (self._rank, self._start) if tensor is not None]

    def grow(self, count: int) -> int:
        """Lets the entries of a rank below ``count`` count; those that did before still do.

        Returns:
            How many entries of these tensors count.
        """
        if count > self._count:
            if any(tensor[0].values._version != tensor[0].written for tensor in self.tensors):
                self.write()
            self._count = count
            for tensor, ranks in zip(self.tensors, self.ranks, strict=True):
                tensor[0].active = entries_within(ranks, count)
        return sum(tensor[0].active for tensor in self.tensors)

    @torch.no_grad()
    def write(self) -> None:
        """Writes the values that count into the dense tensors, and puts the others back."""
        self.stepping = False
        if self._rank is not None:
            self._put_back()
        for tensor in self.tensors:
            entries, active = tensor[0], tensor[0].active
            # Not through .data: a backward pass that still needs the old numbers must fail.
            dense, values = tensor.original.view(-1), entries.values.data
            if active:
                dense.index_copy_(0, entries.index[:active], values[:active])
            entries.written = entries.values._version
        if self._start is not None:
            self._versions = self._versions_now()

    def gradient_of(self, place: slice, like: Tensor) -> Tensor:
        """Zeros for the gradient of one tensor's values, a part of a buffer that all share.

        Args:
            place: where these values lie in ``flat``.
            like: gives the dtype and the device.

        Returns:
            (n,)
        """
        buffer = self._gradients
        fits = buffer is not None and (buffer.dtype, buffer.device) == (like.dtype, like.device)
        # A part that is taken may be a gradient by now. Such parts keep the old buffer.
        if not fits or place.start in self._taken:
            self._gradients, self._taken = like.new_zeros(self.flat.shape), set()
        part = self._gradients[place]
        self._taken.add(place.start)
        if len(self._taken) == len(self.tensors):
            self._gradients = None
        return part

    def _put_back(self) -> None:
        """Gives values that do not count yet what their dense tensors hold."""
        if all(tensor[0].active == len(tensor[0].values) for tensor in self.tensors):
            self._rank = self._start = None
            return
        self._join()
        if (
            self._start is None or self._versions_now() != self._versions
        ):  # after a checkpoint was loaded
            parts = [tensor.original.view(-1)[tensor[0].index] for tensor in self.tensors]
            self._start = torch.cat(parts)
        torch.where(self._rank < self._count, self.flat, self._start, out=self.flat)

    def _versions_now(self) -> list[int]:
        return [tensor.original._version for tensor in self.tensors]

    def _join(self) -> None:
        """Puts the values behind one another again, where a copy or a move has parted them."""
        values = [tensor[0].values for tensor in self.tensors]
        storage = self.flat.untyped_storage()._cdata
        if all(each.untyped_storage()._cdata == storage for each in values):
            return
        self.flat = torch.cat([each.data for each in values])
        for each, part in zip(values, self.flat.split([len(v) for v in values]), strict=True):
            each.data = part
        self._rank, self._start = self._rank.to(self.flat.device), None
