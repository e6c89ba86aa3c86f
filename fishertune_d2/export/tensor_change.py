"""The change of one tensor: new values of single entries, of whole rows, or of whole columns.

A tensor (R, C, ...) has R rows, the slices along its dimension 0, and C columns, the slices along
its dimension 1. A row needs one position for all its values. So a change of whole rows or columns
costs its values and almost nothing else, while each single entry costs a value and about one byte.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fishertune_d2.fisher import slices_of

from .position_bytes import encode_positions

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_SLICES = {None: "entry", 0: "row", 1: "column"}


@dataclass(frozen=True)
class TensorChange:
    """New values of some slices of a tensor.

    Attributes:
        dimension: 0 for rows, 1 for columns, None for single entries of the flattened tensor.
        positions: the slices that change; int64 (n,), ascending.
        values: their new values, slice after slice; (n, ...) without ``dimension``, or (n,).
    """

    dimension: int | None
    positions: Tensor
    values: Tensor

    def apply(self, tensor: Tensor) -> Tensor:
        """Returns a changed copy of the tensor.

        Raises:
            ValueError: if the change is for a tensor of another type or shape.
        """
        name = _SLICES[self.dimension]
        if self.dimension is not None and tensor.ndim != self.values.ndim:
            raise ValueError(
                f"its {name}s are of a tensor of {self.values.ndim} dimensions, and the model's "
                f"has {tensor.ndim}"
            )
        changed = tensor.detach().clone(memory_format=torch.contiguous_format)
        slices = slices_of(changed, self.dimension)
        if self.values.dtype != slices.dtype:
            raise ValueError(f"its values are {self.values.dtype}, the model's {slices.dtype}")
        if self.values.shape[1:] != slices.shape[1:]:
            raise ValueError(
                f"it has values {tuple(self.values.shape[1:])} for a {name}, which is "
                f"{tuple(slices.shape[1:])}"
            )
        last = int(self.positions[-1])
        if last >= len(slices):
            raise ValueError(f"it changes {name} {last}, and the model's end at {len(slices) - 1}")
        slices[self.positions.to(slices.device)] = self.values.to(slices.device)
        return changed


def cheapest_change(tensor: Tensor, differs: Tensor) -> TensorChange | None:
    """Returns the change that holds all entries that differ, in the fewest bytes.

    Args:
        tensor: the new values.
        differs: the entries that differ, at least one; bool, of the shape of ``tensor``.

    Returns:
        Single entries, rows or columns; None if the whole tensor takes no more bytes.
    """
    tensor = tensor.contiguous()
    fewest, best = tensor.nbytes, None
    for dimension in (None, 0, 1) if tensor.ndim > 1 else (None,):
        slices = slices_of(differs, dimension)
        positions = torch.nonzero(slices.reshape(len(slices), -1).any(1)).flatten()
        values = len(positions) * (tensor.nbytes // len(slices))
        size = values + len(encode_positions(positions))
        if size < fewest:
            fewest, best = size, (dimension, positions)
    if best is None:
        return None
    dimension, positions = best
    return TensorChange(dimension, positions, slices_of(tensor, dimension)[positions])


def different_bits(before: Tensor, after: Tensor) -> Tensor:
    """Compares the bits of two tensors on the CPU: NaN equals itself, and 0.0 is not -0.0.

    Args:
        before: a tensor.
        after: a tensor of the same type and shape.

    Returns:
        The entries that differ; bool, of the shape of both.
    """
    return (_bits(before) != _bits(after)).view(before.shape)


def _bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().reshape(-1).view(_INTEGERS[tensor.itemsize])
