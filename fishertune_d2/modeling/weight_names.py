"""Picks the encoder out of a public file and gives its tensors timm's names."""

import re
from collections.abc import Collection
from importlib import import_module
from typing import cast

import timm
import torch
from torch import nn

from .plain_vit import PlainViT
from .weight_files import StateDict, mention_averages

# Prefixes of the encoder's names in files that hold other parts too: SAM's; CLIP's and EVA-CLIP's.
ENCODERS = ("image_encoder.", "visual.")
# Tensors of an encoder that its blocks' outputs do not depend on: those that only pre-training uses
# (mask token, heads, MAE's decoder, CLIP's projection to its text space, DINOv3's extras), SAM's
# neck, and tables that timm computes itself (rotary embeddings, the mask of DINOv3's biases).
NO_ENCODER = re.compile(
    r"^(mask_token$|head\.|lm_head\.|decoder|proj$|projectors\.|local_cls_norm\.|neck\."
    r"|rope\.freqs_|rope_embed\.|position_ids$)|\.rope\.|\.bias_mask$"
)
# The name of the encoder's patch embedding in all public files, after the names of its wrappers.
PATCH_EMBEDDING = re.compile(
    r"((?:\w+\.)*?)"
    r"(?:(?:visual\.|image_encoder\.)?patch_embed\.proj|visual\.conv1"  # timm's, the authors'
    r"|patch_embed\.projection|embeddings\.patch_embeddings?(?:\.projection)?)"  # transformers'
    r"\.weight"
)
# Wrappers of an encoder: DistributedDataParallel, torch.compile, Lightning, Hugging Face's heads,
# segmentors and self-distillation; transformers' names of an encoder in a larger model.
WRAPPERS = frozenset(
    "module _orig_mod model backbone encoder teacher vision_model vision_encoder vit dinov2 "
    "dinov2_with_registers dinov3_vit".split()
)
# Wrappers in files with one encoder. Beside another encoder it is not clear which one is meant.
ALONE = frozenset("student net base_model ema ema_model model_ema body trunk 0".split())
OURS = "backbone.vit.patch_embed.proj.weight"
# transformers' names for DINOv2, DINOv3, CLIP, MAE and SAM, to timm's or DINOv2's authors', in this
# order. The names of versions before 5 are among them, because transformers still writes them.
READ_TRANSFORMERS = [
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.patch_embeddings?(\.projection)?\.", "patch_embed.proj."),
        (r"^patch_embed\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings?(\.weight)?$", "pos_embed"),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.", ""),
        (r"^(?:encoder\.|model\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"\.(?:attention\.output\.dense|attention\.o_proj|self_attn\.out_proj)\.", ".attn.proj."),
        (
            r"\.(?:attention\.attention|attention|self_attn)\.(query|key|value|[qkv]_proj)\.",
            r".attn.\1.",
        ),
        (r"\.q_proj\.", ".query."),
        (r"\.k_proj\.", ".key."),
        (r"\.v_proj\.", ".value."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"\.(?:layernorm_before|layer_norm1)\.", ".norm1."),
        (r"\.(?:layernorm_after|layer_norm2)\.", ".norm2."),
        (r"\.(?:intermediate\.dense|mlp\.lin1)\.", ".mlp.fc1."),
        (r"\.(?:output\.dense|mlp\.lin2)\.", ".mlp.fc2."),
        (r"\.mlp\.weights_in\.", ".mlp.w12."),
        (r"\.mlp\.weights_out\.", ".mlp.w3."),
        (r"^(?:post_)?layernorm\.", "norm."),
        (r"^pre_layrnorm\.", "norm_pre."),
    )
]
# DINOv3's gated MLP has a gate_proj, which marks these names.
GATED = {"gate_proj": "w1", "up_proj": "w2", "down_proj": "w3"}
UNGATED = {"up_proj": "fc1", "down_proj": "fc2"}
# transformers' names for DINOv2 in files, and those of its authors, in this order.
TRANSFORMERS = (
    ("embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("embeddings.position_embeddings", "pos_embed"),
    ("embeddings.", ""),
    ("encoder.layer.", "blocks."),
    ("attention.output.dense", "attn.proj"),
    ("attention.attention.", "attn."),
    ("layer_scale1.lambda1", "ls1.gamma"),
    ("layer_scale2.lambda1", "ls2.gamma"),
    ("mlp.weights_in", "mlp.w12"),
    ("mlp.weights_out", "mlp.w3"),
    ("layernorm.", "norm."),
)


def to_timm_names(state: StateDict, vit: PlainViT) -> tuple[StateDict, list[str]]:
    """Picks out the encoder and gives its tensors the names that they have in ``vit``.

    Sizes do not change. A file with several encoders, or with biases of query and value that the
    model lacks, raises a ValueError.

    Args:
        state: tensors by timm's names, the authors', or those of transformers (which has no
            EVA-02); with or without wrappers.
        vit: the timm model that the tensors are for.

    Returns:
        The renamed tensors, and the names in ``state`` of the tensors that are left out.
    """
    state, outside = _unwrap(state)
    encoder, ignored = _to_timm_names(state, vit)
    return encoder, outside + ignored


def _unwrap(state: StateDict) -> tuple[StateDict, list[str]]:
    """Removes the wrappers from the encoder's names, and leaves out the tensors outside them."""
    every = {match[1] for name in state if (match := PATCH_EMBEDDING.fullmatch(name))}
    found = {outer for outer in every if set(outer.split(".")[:-1]) <= WRAPPERS}
    if not found and len(every) == 1:
        found = {o for o in every if set(o.split(".")[:-1]) <= WRAPPERS | ALONE}
    if len(found) > 1:  # the teacher is the result of self-distillation
        found = {outer for outer in found if "teacher" in outer.split(".")} or found
    if len(found) > 1:
        raise ValueError(
            f"the file holds several encoders: {', '.join(sorted(found))}. Save the tensors of one "
            "of them in a file of their own"
        )
    outer = next(iter(found), "")
    # FisherTune's own checkpoints stay as they are, and do not fit: they are not public weights.
    if not outer or any(name.endswith(OURS) for name in state):
        return state, []
    mention_averages({o.split(".")[0] for o in every - {outer}}, repr(outer.removesuffix(".")))
    inside = {n.removeprefix(outer): v for n, v in state.items() if n.startswith(outer)}
    return inside, [name for name in state if not name.startswith(outer)]


def _to_timm_names(state: StateDict, vit: PlainViT) -> tuple[StateDict, list[str]]:
    """Renames an encoder without wrappers."""
    if any(name.startswith(("embeddings.", "patch_embed.projection.")) for name in state):
        state = from_transformers(state)
    prefix = next((p for p in ENCODERS if any(name.startswith(p) for name in state)), "")
    wanted = set(vit.state_dict())
    ignored = [
        name
        for name in state
        if not name.startswith(prefix) or _left_out(name.removeprefix(prefix), wanted)
    ]
    encoder = {name: value for name, value in state.items() if name not in ignored}
    if set(encoder) == wanted:
        return encoder, ignored
    zeros = _zero_biases(state, vit)
    # The whole state, because the converter also tells families apart by ignored tensors.
    state = {name: value for name, value in state.items() if name not in zeros}
    converted = _convert(state, vit.pretrained_cfg["architecture"])
    converted = {name: v for name, v in converted.items() if not _left_out(name, wanted)}
    return converted, ignored + zeros


def _left_out(name: str, wanted: Collection[str]) -> bool:
    """Whether a tensor is no part of the encoder; CLIP's head is one if the model has a head."""
    return NO_ENCODER.search(name) is not None and name not in wanted


def _convert(state: StateDict, architecture: str) -> StateDict:
    """Renames tensors with timm's own converter for this family of models."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    # The converter also resizes tensors to the model, by its own rules, unless the model has no
    # position embedding and the file's own patch size.
    model = cast(PlainViT, model)
    model.pos_embed = None
    has_patches = hasattr(model, "patch_embed")  # a ConvNeXt has none
    for name, kernel in state.items():
        if has_patches and name.endswith(("patch_embed.proj.weight", "conv1.weight")):
            model.patch_embed.proj.weight = nn.Parameter(kernel.to("meta"))
    try:
        return import_module(type(model).__module__).checkpoint_filter_fn(state, model)
    except KeyError:  # ConvNeXt's looks each name up in the model, and this file is of another one
        return state


def _zero_biases(state: StateDict, vit: PlainViT) -> list[str]:
    """Returns the names of DINOv3's biases of query, key and value that ``vit`` lacks."""
    # These hold zeros, except for the key's third, which the authors mask.
    if "storage_tokens" not in state:
        return []
    biases = [name for name in state if name.endswith("attn.qkv.bias")]
    absent = [n for n in biases if n.replace("qkv.bias", "q_bias") not in vit.state_dict()]
    for name in absent:
        query, _, value = state[name].chunk(3)
        if query.any() or value.any():
            raise ValueError(
                f"{name} is not zero, and {vit.pretrained_cfg['architecture']} has no such bias: "
                "take the timm model of the same name with _qkvb in it"
            )
    return absent


def from_transformers(state: StateDict) -> StateDict:
    """Returns transformers' tensors by timm's names (CLIP, MAE, SAM) or Meta's (DINOv2 and 3).

    ``state`` is the encoder alone. Query, key and value, separate except in SAM, become one tensor.
    """
    mlp = GATED if any(".mlp.gate_proj." in name for name in state) else UNGATED
    renamed = {}
    for name, tensor in state.items():
        for pattern, ours in READ_TRANSFORMERS:
            name = pattern.sub(ours, name)
        for theirs, ours in mlp.items():
            name = name.replace(f".mlp.{theirs}.", f".mlp.{ours}.")
        renamed[name] = tensor
    for query in [name for name in renamed if ".attn.query." in name]:
        first = renamed.pop(query)
        others = [renamed.pop(query.replace("query", p), None) for p in ("key", "value")]
        # DINOv3's key has no bias.
        parts = [first, *(torch.zeros_like(first) if t is None else t for t in others)]
        renamed[query.replace("query", "qkv")] = torch.cat(parts)
    if "pos_embed" not in renamed and "register_tokens" in renamed:  # DINOv3
        renamed["storage_tokens"] = renamed.pop("register_tokens")
    for name in ("cls_token", "pos_embed"):  # CLIP's are (D,) and (P + h*w, D)
        while name in renamed and renamed[name].ndim < 3:
            renamed[name] = renamed[name][None]
    return renamed


def to_transformers(state: StateDict) -> StateDict:
    """Returns DINOv2's tensors by transformers' names, given timm's; with or without registers.

    A mask token of zeros, which only pre-training uses, is added.
    """
    renamed = {"embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    packed = state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    for name, tensor in state.items():
        if name == "pos_embed" and "reg_token" in state:
            # timm has added the class token's position to the token.
            tensor = torch.cat([torch.zeros_like(tensor[:, :1]), tensor], dim=1)
        if name in ("cls_token", "reg_token"):
            name = f"embeddings.{name}".replace("reg_token", "register_tokens")
        if packed:
            name = name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")
        for theirs, ours in TRANSFORMERS:
            name = name.replace(ours, theirs) if ours else name
        if ".qkv." not in name:
            renamed[name] = tensor
            continue
        for part, rows in zip(("query", "key", "value"), tensor.chunk(3), strict=True):
            renamed[name.replace("qkv", part)] = rows
    return renamed
