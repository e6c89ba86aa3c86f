"""A config's model without values: its graph can be built, and takes no memory.

The model comes in two forms. FLOPs are counted on PyTorch's meta device. Memory is counted on
FakeTensors of MODEL.DEVICE, which follow that device's choices: the dtypes of its autocast, and its
attention that keeps no matrix. The GPU need not exist. Without a GPU, PyTorch can run a forward
pass on FakeTensors of one, but no backward pass, so FLOPs are not counted there.

Shapes: B images, C classes, (H, W) pixels; q, k, v (B, heads, N, D / heads).
"""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from fishertune_d2.engine.parameter_counts import build_empty
from fishertune_d2.fisher import Selection, Units
from fishertune_d2.modeling.segmentor import VFMSegmentor
from fishertune_d2.modeling.targets import SegmentationTargets


def fake_model(cfg: CfgNode) -> VFMSegmentor:
    """Builds the config's segmentor on the meta device, with losses that need no values."""
    # Every image holds every class, and the k-th query is matched with the k-th class: no batch has
    # more matches. The matcher itself does not run.
    model = cast(VFMSegmentor, build_empty(cfg, build_model).train())
    criterion = getattr(model.sem_seg_head, "criterion", None)
    if criterion is not None:  # Detectron2's heads match nothing
        criterion.match = match_in_order
    # Replaces the class's method for this model alone.
    vars(model)["features_and_targets"] = partial(_features_and_targets, model)
    return model


def fake_selection(
    parameters: Mapping[str, nn.Parameter], count: int, base: int, unit: str = "weight"
) -> Selection:
    """Selects ``count`` of ``base`` weights, spread evenly over all units, without values."""
    shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
    groups = Units(unit, shapes).groups
    device = next(iter(parameters.values())).device
    whole, total = sum(group.count * group.size for group in groups.values()), 0
    indices = {}
    for name, group in groups.items():
        before, total = total, total + group.count * group.size
        weights = count * total // whole - count * before // whole
        indices[name] = torch.empty(weights // group.size, dtype=torch.int64, device=device)
    ranks = {name: torch.empty_like(each) for name, each in indices.items()}
    return Selection(indices, ranks, shapes, count / base, base, unit=unit)


def fake_batch(model: VFMSegmentor, images: int, size: tuple[int, int]) -> list[dict[str, Tensor]]:
    """Makes a batch of images of (height, width), padded as the segmentor pads them."""
    padded = padded_size(model, size)
    image, label = (torch.empty(*shape, dtype=torch.uint8) for shape in ((3, *padded), padded))
    return [{"image": image, "sem_seg": label}] * images


def padded_size(model: VFMSegmentor, size: tuple[int, int]) -> tuple[int, int]:
    """Rounds (height, width) up to whole patches, as the segmentor does."""
    patch = model.backbone.size_divisibility
    return -(-size[0] // patch) * patch, -(-size[1] // patch) * patch


@contextmanager
def on_fake_device(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Moves a model from the meta device to a fake one, and makes new tensors fake, too."""
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutValues():
        model.to_empty(device=device)
        yield


@contextmanager
def fake_autocast(device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Does what ``torch.autocast`` does, also for a GPU that does not exist; nothing for None."""
    # The meta device has no autocast, and counts the same FLOPs without.
    if dtype is None or device.type == "meta":
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.autocast says that it disables itself without a GPU
        autocast = torch.autocast(device.type, dtype)
    with autocast:
        torch.set_autocast_enabled(device.type, True)
        yield


# The model and its losses ask whether values are finite.
_FINITE = {Tensor.__bool__: True, Tensor.__float__: 1.0}


class WithoutValues(TorchFunctionMode):
    """Replaces the few operations that need values, or a real GPU."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        """See torch.overrides."""
        kwargs = kwargs or {}
        if func in _FINITE and (args[0].is_meta or isinstance(args[0], FakeTensor)):
            return _FINITE[func]
        if func is F.scaled_dot_product_attention and isinstance(args[0], FakeTensor):
            return _attention(*args, **kwargs)
        return func(*args, **kwargs)


def _attention(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **options):
    # Without a GPU, PyTorch would not choose a GPU's kernel. That kernel needs a dimension for
    # heads, which timm's SAM folds into the images: SAM's attention keeps its matrix everywhere.
    if q.device.type == "cpu" or q.dim() != 4:
        options |= {"scale": scale, "is_causal": is_causal}
        return F.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, **options)
    if torch.is_autocast_enabled(q.device.type):
        q, k, v = (x.to(torch.get_autocast_dtype(q.device.type)) for x in (q, k, v))
    if attn_mask is not None:
        attn_mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    operator = torch.ops.aten._scaled_dot_product_efficient_attention
    return operator(q, k, v, attn_mask, True, dropout_p, is_causal, scale=scale)[0]


def match_in_order(
    predictions: Mapping[str, Sequence[Tensor]], masks: Sequence[Tensor], labels: Sequence[Tensor]
) -> list[list[tuple[Tensor, Tensor]]]:
    """Replaces the criterion's ``match``, which needs values."""
    matched = []
    for class_logits, _ in predictions.values():
        queries, device = class_logits.shape[1], class_logits.device
        places = [torch.arange(min(queries, len(each)), device=device) for each in labels]
        matched.append([(place, place) for place in places])
    return matched


def _features_and_targets(
    model: VFMSegmentor, batch: Sequence[dict]
) -> tuple[dict, SegmentationTargets]:
    """Replaces the segmentor's method, whose ImageList reads the images' sizes as values."""
    images, labels = (torch.stack([each[key] for each in batch]) for key in ("image", "sem_seg"))
    classes = [torch.arange(model.head.num_classes)] * len(batch)
    targets = SegmentationTargets(labels.to(model.device), classes)
    return model.backbone(images.to(model.device).float()), targets
