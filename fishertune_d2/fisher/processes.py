"""Sums over the processes of torch.distributed; without a process group there is only one."""

from collections.abc import Iterable

import torch
from torch import Tensor


def rank_and_size() -> tuple[int, int]:
    """The rank of this process, and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def sum_over_processes(tensors: Iterable[Tensor]) -> None:
    """Adds up each tensor over all processes, in place."""
    if rank_and_size()[1] > 1:
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)
