"""Encodes ascending positions in about one byte each, as the gaps between them.

A gap is the number of positions that are skipped. A byte below 255 adds its value and ends a gap;
255 adds its value, and the gap continues. So n positions in a tensor of N entries take at most
n + N / 255 bytes, however they are spread: for 5 % of all weights, 5.4 % of a byte per weight.
"""

import torch
from torch import Tensor

_CONTINUES = 255


def encode_positions(positions: Tensor) -> Tensor:
    """Returns the uint8 code (m,), on the CPU, of int64 positions (n,).

    Raises:
        ValueError: if a position is negative, or not above the one before.
    """
    positions = positions.cpu()
    gaps = torch.diff(positions, prepend=positions.new_tensor([-1])) - 1
    if bool((gaps < 0).any()):
        raise ValueError("positions must be at least 0 and strictly ascending")
    ends = torch.cumsum(gaps // _CONTINUES + 1, 0) - 1
    length = int(ends[-1]) + 1 if len(ends) else 0
    code = torch.full((length,), _CONTINUES, dtype=torch.uint8)
    code[ends] = (gaps % _CONTINUES).to(torch.uint8)
    return code


def decode_positions(code: Tensor) -> Tensor:
    """Returns the int64 positions (n,) in a uint8 code (m,).

    From any bytes, positions ascend strictly and are no more than the bytes.

    Raises:
        ValueError: if the last byte does not end a gap.
    """
    ends = code != _CONTINUES
    if len(code) and not bool(ends[-1]):
        raise ValueError("the last gap does not end")
    skipped = torch.cumsum(code, 0, dtype=torch.int64)[ends]
    return skipped + torch.arange(len(skipped))
