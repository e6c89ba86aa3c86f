"""From the names in a public file to timm's, and what in the file is no part of the encoder."""

import re
from importlib import import_module

import timm
import torch
from torch import Tensor, nn

StateDict = dict[str, Tensor]

# What the encoder's names begin with in files that hold more than it: SAM's; CLIP's and EVA-CLIP's.
ENCODERS = ("image_encoder.", "visual.")
# Of an encoder, but not in the way to its blocks' outputs: what only pre-training uses (mask token,
# heads, MAE's decoder, CLIP's projection to its text space, DINOv3's extras), SAM's neck, and
# tables that timm computes itself (rotary embeddings, which rows of DINOv3's biases are masked).
NO_ENCODER = re.compile(
    r"^(mask_token$|head\.|lm_head\.|decoder|proj$|projectors\.|local_cls_norm\.|neck\."
    r"|rope\.freqs_|rope_embed\.)|\.rope\.|\.bias_mask$"
)
# In this order: the names that transformers gives DINOv2, and those of its authors.
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


def to_timm_names(state: StateDict, vit: nn.Module) -> tuple[StateDict, list[str]]:
    """Picks out the encoder and gives its tensors the names they have in ``vit``.

    Sizes stay as they are in the file.

    Args:
        state: with timm's names, with the authors', or, for DINOv2, with those of transformers.
        vit: the timm model they are for.

    Returns:
        The renamed tensors, and the names in ``state`` of those that were left out.

    Raises:
        ValueError: the file has biases of query and value that the model lacks.
    """
    if "embeddings.cls_token" in state:
        state = from_transformers(state)
    prefix = next((p for p in ENCODERS if any(name.startswith(p) for name in state)), "")
    ignored = [
        name
        for name in state
        if not name.startswith(prefix) or NO_ENCODER.search(name.removeprefix(prefix))
    ]
    encoder = {name: value for name, value in state.items() if name not in ignored}
    if set(encoder) == set(vit.state_dict()):
        return encoder, ignored
    zeros = _zero_biases(state, vit)
    # The whole state: the converter tells families apart by what is ignored here, too.
    state = {name: value for name, value in state.items() if name not in zeros}
    converted = _convert(state, vit.pretrained_cfg["architecture"])
    converted = {name: v for name, v in converted.items() if not NO_ENCODER.search(name)}
    return converted, ignored + zeros


def _convert(state: StateDict, architecture: str) -> StateDict:
    """Renames with timm's own converter for this family of models."""
    with torch.device("meta"):
        model = timm.create_model(architecture, num_classes=0)
    # The converter also resizes, by rules of its own, to the model that it is given. One without a
    # position embedding and with the file's own patches keeps it from that.
    model.pos_embed = None
    for name, kernel in state.items():
        if name.endswith(("patch_embed.proj.weight", "conv1.weight")):
            model.patch_embed.proj.weight = nn.Parameter(kernel.to("meta"))
    return import_module(type(model).__module__).checkpoint_filter_fn(state, model)


def _zero_biases(state: StateDict, vit: nn.Module) -> list[str]:
    """Names of DINOv3's biases of query, key and value: zeros, which timm's models do without.

    The key's third is masked by its authors, whatever it holds.
    """
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
    """Renames DINOv2, with or without registers, as transformers stores it, to Meta's names.

    Args:
        state: 16 tensors per block; query, key and value apart.

    Returns:
        14 tensors per block; query, key and value in one.
    """
    renamed = {}
    for name, tensor in state.items():
        for theirs, ours in TRANSFORMERS:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    for query in [name for name in renamed if ".attn.query." in name]:
        parts = [renamed.pop(query.replace("query", part)) for part in ("query", "key", "value")]
        renamed[query.replace("query", "qkv")] = torch.cat(parts)
    return renamed


def to_transformers(state: StateDict) -> StateDict:
    """Renames DINOv2, with or without registers, from timm's names to those of transformers.

    Args:
        state: with timm's names.

    Returns:
        The tensors as transformers stores them, and a mask token of zeros, which only pre-training
        uses.
    """
    renamed = {"embeddings.mask_token": torch.zeros(1, state["cls_token"].shape[-1])}
    packed = state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]
    for name, tensor in state.items():
        if name == "pos_embed" and "reg_token" in state:
            # timm added the class token's position to the token.
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
