"""Multiplications of a forward and a backward pass, counted by fvcore.

One multiply-add is one FLOP, as fvcore and most papers on vision count. A backward pass has, by
the usual rule, for each operator as much again for each of its operands that needs a gradient:
once for the input, once for the weight. What is frozen and has nothing to train before it costs
none. No kernel's recomputing is counted, and no work that is done number by number. The backbone's
checkpointed blocks are: their forward pass is paid twice.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from fvcore.nn import FlopCountAnalysis
from fvcore.nn.jit_handles import (
    Handle,
    addmm_flop_jit,
    bmm_flop_jit,
    conv_flop_jit,
    elementwise_flop_counter,
    get_shape,
    linear_flop_jit,
    matmul_flop_jit,
    norm_flop_counter,
)
from torch import Tensor, nn

from fishertune_d2.modeling.heads import SegmentationHead

from .imagined import WithoutValues, every_class

FORWARD, INPUTS, WEIGHTS = "forward", "gradients of inputs", "gradients of weights"

# What fvcore does not count, and need not: work number by number, far below a hundredth of a pass.
SMALL = frozenset(
    f"aten::{name}"
    for name in (
        "_upsample_bicubic2d_aa abs add add_ binary_cross_entropy_with_logits cos "
        "cross_entropy_loss div fill_ gelu linspace lt masked_fill_ mean meshgrid mul ne neg pad "
        "pow rand repeat repeat_interleave rsub sigmoid silu sin softmax sub sum topk "
        "upsample_linear1d"
    ).split()
)


@dataclass(frozen=True)
class Flops:
    """Multiply-adds by (operator, part), the part being one of FORWARD, INPUTS and WEIGHTS.

    Attributes:
        all: of the whole pass.
        backbone: the backbone's share of it.
        uncounted: operators that are neither counted nor known to be small, and how often they
            were met.
    """

    all: Counter
    backbone: Counter
    uncounted: Counter

    @property
    def forward(self) -> int:
        """Of the forward pass."""
        return _of(self.all, FORWARD)

    @property
    def backward(self) -> int:
        """Of the backward pass."""
        return _of(self.all, INPUTS) + _of(self.all, WEIGHTS)

    @property
    def recomputed(self) -> int:
        """What checkpointed blocks cost at most: the backbone's forward pass, if it trains."""
        trains = any(part == WEIGHTS for (_, part), n in self.backbone.items() if n)
        return _of(self.backbone, FORWARD) if trains else 0

    @property
    def measuring(self) -> int:
        """Of a pass that measures F: gradients of all inputs, and of the backbone's weights."""
        return self.forward + _of(self.all, INPUTS) + _of(self.backbone, WEIGHTS)


def count_flops(step: nn.Module, inputs: Sequence[Tensor]) -> Flops:
    """Counts one forward pass, and the backward pass that the parameters' flags ask for.

    Args:
        step: a module with a ``backbone``, on the meta device.
        inputs: what to call it with.
    """
    analysis = FlopCountAnalysis(step, tuple(inputs)).set_op_handle(**_HANDLES)
    analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False)
    with WithoutValues():
        by_module = analysis.by_module_and_operator()
    unsupported = analysis.unsupported_ops()
    uncounted = Counter({name: n for name, n in unsupported.items() if name not in SMALL})
    return Flops(_keyed(by_module[""]), _keyed(by_module["backbone"]), uncounted)


class _Pass(nn.Module):
    """Of a segmentor, what a pass calls.

    Args:
        segmentor: an imagined one.
    """

    def __init__(self, segmentor: nn.Module):
        super().__init__()
        self.backbone, self.sem_seg_head = segmentor.backbone, segmentor.sem_seg_head
        self._head = (segmentor.head,)  # which may be the module above, or an adapter around it

    @property
    def head(self) -> SegmentationHead:
        """What drives the segmentation head."""
        return self._head[0]


class TrainingPass(_Pass):
    """From images (B, 3, H, W) and labels (B, H, W) to the sum of the losses."""

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """See the class."""
        targets = every_class(labels, self.head.num_classes)
        return sum(self.head(self.backbone(images), targets)[1].values())


class InferencePass(_Pass):
    """From images (B, 3, H, W) to their scores (B, C, H, W)."""

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        size = tuple(int(side) for side in images.shape[-2:])
        return self.head(self.backbone(images), image_size=size)[0]


def _keyed(counts: Counter) -> Counter:
    # fvcore's own handles, of operators that are not below, know no backward pass.
    pairs = ((key if isinstance(key, tuple) else (key, FORWARD), n) for key, n in counts.items())
    return Counter(dict(pairs))


def _of(counts: Counter, part: str) -> int:
    return sum(n for (_, each), n in counts.items() if each == part)


def _gradients(operands: Sequence[Any], outputs: Sequence[Any]) -> int:
    """How many operands a backward pass gives a gradient; none under ``torch.no_grad``."""
    return sum(each.requires_grad() for each in operands) if outputs[0].requires_grad() else 0


def _parts(
    name: str, count: Callable, inputs: Sequence[int] = (0,), weights: Sequence[int] = ()
) -> tuple[str, Handle]:
    """A handle that counts an operator, and by its operands' places its backward pass."""

    def handle(operands: list[Any], outputs: list[Any]) -> Counter:
        number = count(operands, outputs)
        number = sum(number.values()) if isinstance(number, Counter) else number
        return Counter(
            {
                (name, FORWARD): number,
                (name, INPUTS): number * _gradients([operands[i] for i in inputs], outputs),
                (name, WEIGHTS): number * _gradients([operands[i] for i in weights], outputs),
            }
        )

    return f"aten::{name}", handle


def _attention(operands: list[Any], outputs: list[Any]) -> Counter:
    """Both products, q k^T and attention times v; q and k need the attention's gradient too."""
    q, k, v = operands[:3]
    product = prod(get_shape(q)) * get_shape(k)[-2]
    name = "scaled_dot_product_attention"
    gradients = _gradients([q, k, v], outputs) + (_gradients([q, k], outputs) > 0)
    return Counter({(name, FORWARD): 2 * product, (name, INPUTS): gradients * product})


def _einsum(operands: list[Any], outputs: list[Any]) -> Counter:
    """A sum over two operands; fvcore's own rounds to four digits."""
    equation = operands[0].toIValue().replace(" ", "").split("->")[0]
    tensors = list(operands[1].node().inputs())
    sizes: dict[str, int] = {}
    for letters, tensor in zip(equation.split(","), tensors, strict=True):
        sizes |= zip(letters, get_shape(tensor), strict=True)
    number = prod(sizes.values())
    gradients = _gradients(tensors, outputs)
    return Counter({("einsum", FORWARD): number, ("einsum", INPUTS): gradients * number})


_HANDLES: dict[str, Handle] = {
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    **dict(
        [
            _parts("linear", linear_flop_jit, weights=(1,)),
            _parts("_convolution", conv_flop_jit, weights=(1,)),
            _parts("addmm", addmm_flop_jit, inputs=(1,), weights=(2,)),
            _parts("mm", matmul_flop_jit, inputs=(0, 1)),
            _parts("matmul", matmul_flop_jit, inputs=(0, 1)),
            _parts("bmm", bmm_flop_jit, inputs=(0, 1)),
            _parts("baddbmm", lambda i, o: bmm_flop_jit(i[1:3], o), inputs=(1, 2)),
            _parts("layer_norm", norm_flop_counter(2), weights=(2,)),
            _parts("group_norm", norm_flop_counter(2), weights=(2,)),
            _parts("upsample_bilinear2d", elementwise_flop_counter(0, 4)),
            _parts("grid_sampler", elementwise_flop_counter(0, 4), inputs=(0, 1)),
        ]
    ),
}
