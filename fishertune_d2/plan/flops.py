"""FLOPs of a forward and a backward pass, counted by PyTorch on tensors without values.

One multiply-add is one FLOP, as fvcore and most papers on vision count; PyTorch's FlopCounterMode
counts it as two. The counter knows matrix products, convolutions and attention. Elementwise
work (norms, activations, resampling) is left out: it takes about a hundredth of a pass.

Autograd computes only the gradients that something needs, so frozen parts before the first trained
weight cost no backward pass. Checkpointed blocks pay their forward pass twice. On the meta device
attention consists of plain matrix products: the products that fused kernels repeat are not counted.
"""

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from .fake_model import WithoutValues

# Families of PyTorch's own operators that multiply matrices, and for which it has no formula. The
# norm of a vector multiplies none.
_EXPENSIVE = re.compile("linalg(?!_vector_norm)|fft|cdist|cholesky|rnn|lstm|gru")


@dataclass(frozen=True)
class Flops:
    """Multiply-adds of one pass.

    Attributes:
        forward: those of the forward pass.
        backward: those of the backward pass.
        uncounted: operators that neither number includes though they may matter, and how often they
            are called.
    """

    forward: int
    backward: int
    uncounted: Counter[str]


def count_flops(forward: Callable[[], Tensor], wanted: Sequence[Tensor] = ()) -> Flops:
    """Counts one forward pass, and the backward pass that computes the gradients of ``wanted``.

    Args:
        forward: computes a loss, on the meta device; of several losses the sum is differentiated.
        wanted: the tensors whose gradients are computed; none for no backward pass.

    Returns:
        The counts.
    """
    with WithoutValues(), FlopCounterMode(display=False) as counter, _Uncounted() as uncounted:
        loss = forward()
        before = counter.get_total_flops()
        if wanted:
            torch.autograd.backward(loss.sum(), inputs=list(wanted))
    return Flops(before // 2, (counter.get_total_flops() - before) // 2, uncounted.found)


class _Uncounted(TorchDispatchMode):
    """Notes operators that FlopCounterMode takes as free though they may be expensive.

    Those are operators from outside PyTorch, such as a deformable convolution, and the families of
    PyTorch's own in ``_EXPENSIVE``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """See torch.utils._python_dispatch."""
        foreign = func.namespace not in ("aten", "prims")
        if func._overloadpacket not in flop_registry and (foreign or _EXPENSIVE.search(str(func))):
            self.found[str(func._overloadpacket)] += 1
        return func(*args, **(kwargs or {}))
