"""A config's model without its numbers: its graph can be built, and takes no memory.

Twice, because no one way serves both counts. On the meta device the tracer of fvcore, which counts
multiplications, can follow. As fake tensors of MODEL.DEVICE the model also makes that device's
choices, such as what autocast halves and which attention keeps no matrix; so memory is counted
there, for a GPU too where there is none.

Shapes: B images, C classes, Q queries, (H, W) pixels; q, k, v (B, heads, N, D / heads).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fishertune_d2.engine.parameter_counts import build_empty, count_tuned
from fishertune_d2.fisher import Selection
from fishertune_d2.modeling.targets import SegmentationTargets
from fishertune_d2.tuning import TuningMethod


def imagine(cfg: CfgNode) -> nn.Module:
    """The segmentor of a config on the meta device, in training mode; its losses need no values."""
    model = build_empty(cfg, build_model).train()
    stand_in_for_values(model)
    return model


def stand_in_for_values(model: nn.Module) -> None:
    """Replaces what a segmentor's losses read of their numbers, in place.

    Every class is in every image, and the k-th query is matched with the k-th class. That is as
    many matches as there can be. The matcher's own work falls away.
    """
    criterion = getattr(model.sem_seg_head, "criterion", None)
    if criterion is not None:  # Detectron2's heads match nothing
        criterion.match = _in_order
    model.features_and_targets = partial(_features_and_targets, model)


def imagine_selection(cfg: CfgNode, backbone: nn.Module, method: TuningMethod) -> Selection:
    """As many weights as ``method`` selects, spread evenly over its parameters."""
    parameters = method.parameters(backbone)
    count, total = count_tuned(cfg, backbone, progress=1.0), 0
    whole = sum(p.numel() for p in parameters.values())
    indices = {}
    for name, parameter in parameters.items():
        before, total = total, total + parameter.numel()
        number = count * total // whole - count * before // whole
        indices[name] = torch.empty(number, dtype=torch.int64, device=parameter.device)
    ranks = {name: torch.empty_like(each) for name, each in indices.items()}
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    base = sum(p.numel() for p in backbone.parameters())
    return Selection(indices, ranks, shapes, count / base, base)


def padded_size(model: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    """What (height, width) becomes where the segmentor pads to whole patches."""
    patch = model.backbone.size_divisibility
    height, width = (-(-side // patch) * patch for side in size)
    return height, width


@contextmanager
def on_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves an imagined model, for good, to a device that need not exist.

    What is made while this is entered is imagined, too.
    """
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutValues():
        model.to_empty(device=device)
        yield


@contextmanager
def autocast_on(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """``torch.autocast`` by another way, for that switches itself off where there is no GPU.

    Args:
        device: where the model is imagined to be.
        dtype: to compute in; None for no autocast.
    """
    if dtype is None:
        yield
        return
    kind = device.type
    before = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
    torch.set_autocast_enabled(kind, True)
    torch.set_autocast_dtype(kind, dtype)
    torch.autocast_increment_nesting()
    try:
        yield
    finally:
        if torch.autocast_decrement_nesting() == 0:
            torch.clear_autocast_cache()
        torch.set_autocast_enabled(kind, before[0])
        torch.set_autocast_dtype(kind, before[1])


# What the model and its losses ask of values is whether they are finite.
_FINITE = {Tensor.__bool__: True, Tensor.__float__: 1.0}


class WithoutValues(TorchFunctionMode):
    """While entered, what cannot be done on imagined tensors is done in another way."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See torch.overrides."""
        kwargs = kwargs or {}
        if func in _FINITE and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return _FINITE[func]
        if func is F.conv2d and args[0].is_meta:
            return _convolution(*args, **kwargs)
        if func is F.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    # The operator that a trace on a real device shows. On the meta device it would show none: the
    # kernel there is Python, and fails on the tracer's sizes.
    stride, padding, dilation = (
        (each, each) if isinstance(each, int) else each for each in (stride, padding, dilation)
    )
    options = False, (0, 0), groups, False, False, False, False
    return torch._convolution(x, weight, bias, stride, padding, dilation, *options)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    # Where there is no GPU, a GPU's kernel would not be chosen. It needs a dimension for heads,
    # which timm's SAM folds into that of images: that attention keeps its matrix on any device.
    if q.device.type == "cpu" or q.dim() != 4:
        options |= {"scale": scale, "is_causal": is_causal}
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, **options)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def every_class(labels: Tensor, num_classes: int) -> SegmentationTargets:
    """Labels (B, H, W) of which every image holds every class."""
    return SegmentationTargets(labels, [torch.arange(num_classes)] * len(labels))


def _in_order(
    predictions: Mapping[str, Sequence[Tensor]], masks: Sequence[Tensor], labels: Sequence[Tensor]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Stands in for the criterion's ``match``, which needs values."""
    matched = []
    for class_logits, _ in predictions.values():
        queries, device = class_logits.shape[1], class_logits.device
        pairs = [torch.arange(min(queries, len(each)), device=device) for each in labels]
        matched.append([(pair, pair) for pair in pairs])
    return matched


def _features_and_targets(
    model: nn.Module, batch: Sequence[dict]
) -> tuple[dict, SegmentationTargets]:
    """Stands in for the segmentor's: Detectron2's ImageList makes numbers of the images' sizes."""
    images, labels = (torch.stack([each[key] for each in batch]) for key in ("image", "sem_seg"))
    targets = every_class(labels.to(model.device), model.head.num_classes)
    return model.backbone(images.to(model.device).float()), targets
