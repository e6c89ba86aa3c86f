"""Writes tuned models in the files of other programs: one function for each layout.

Each function writes a folder. It refuses a model that does not fit the layout before it writes.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fishertune_d2.config import changed, default_config
from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.files import whole_file
from fishertune_d2.modeling import VFMS, VFMBackbone
from fishertune_d2.modeling.weight_names import to_transformers

from .delta import Architecture, StateDict
from .model_card import ModelCard

# The prefix of the ViT's tensors in a checkpoint.
BACKBONE = "backbone.vit."


@dataclass
class TunedModel:
    """A tuned backbone, and the decoder that was trained with it.

    Attributes:
        architecture: the backbone's.
        vit: the ViT's weights, by timm's names.
        decoder: the rest of the segmentation model, by its names in a checkpoint; may be empty.
        record: the parts of the run's checkpoint that describe the run; empty if it is not known.
        card: the facts of the run for others.
    """

    architecture: Architecture
    vit: StateDict
    decoder: StateDict = field(default_factory=dict)
    record: Mapping[str, Any] = field(default_factory=dict)
    card: ModelCard = field(default_factory=ModelCard)


def empty_backbone(architecture: Architecture) -> VFMBackbone:
    """Builds the backbone without weights; an unknown VFM raises a ValueError."""
    with torch.device("meta"):
        return VFMBackbone(
            name=architecture.vfm,
            weights="random",
            img_size=architecture.img_size,
            patch_size=architecture.patch_size,
        )


def write_timm(model: TunedModel, folder: Path) -> None:
    """Writes ``model.safetensors`` and ``config.json``, the files of timm's models on the Hub.

    ``timm.create_model("local-dir:FOLDER", pretrained=True)`` reads them, and so does
    ``AutoModel.from_pretrained`` of transformers, through timm. Neither reads a backbone without
    some parts of timm's model (``VFM.without``); the model card shows how to load that.
    """
    backbone = empty_backbone(model.architecture)
    architecture, _, tag = model.architecture.timm_name.partition(".")
    mean, std = model.architecture.pixel_mean, model.architecture.pixel_std
    config = {
        "architecture": architecture,
        "num_classes": 0,
        "num_features": backbone.vit.num_features,
        "model_args": backbone.timm_args,
        "pretrained_cfg": {
            "tag": tag,
            **_input_size(backbone.timm_args),
            "fixed_input_size": False,
            "mean": [value / 255 for value in mean],
            "std": [value / 255 for value in std],
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "num_classes": 0,
            "first_conv": backbone.vit.pretrained_cfg["first_conv"],
            "classifier": "head",
            "license": VFMS[model.architecture.vfm].licence,
        },
    }
    _write_weights(model.vit, folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def write_transformers(model: TunedModel, folder: Path) -> None:
    """Writes ``model.safetensors`` and its configuration in transformers' own layout of DINOv2.

    ``AutoModel.from_pretrained`` and ``AutoImageProcessor.from_pretrained`` read the folder. At the
    stored image size the features equal the backbone's. At others, transformers resizes the
    position embedding by its own rules.

    Raises:
        ValueError: if transformers has no such model, or cannot hold its position embedding.
    """
    from transformers import AutoConfig, BitImageProcessor  # slow to import

    architecture = model.architecture
    if not _is_dinov2(architecture.timm_name):
        able = [name for name, vfm in VFMS.items() if _is_dinov2(vfm.timm_name)]
        raise ValueError(
            f"the layout transformers is for {', '.join(able)}, not {architecture.vfm}: write "
            "the layout timm"
        )
    vit = empty_backbone(architecture).vit
    assert vit.patch_embed.grid_size is not None
    rows, columns = vit.patch_embed.grid_size
    if rows != columns:
        raise ValueError(
            "transformers' DINOv2 needs a square position embedding, and "
            f"MODEL.VFM.IMG_SIZE {architecture.img_size} gives {rows} x {columns} patches: write "
            "the layout timm, which transformers' AutoModel reads too"
        )
    registers = {"num_register_tokens": vit.num_reg_tokens} if vit.num_reg_tokens else {}
    weights = vit.state_dict()
    hidden = weights["blocks.0.mlp.fc2.weight"].shape[1]
    swiglu = weights["blocks.0.mlp.fc1.weight"].shape[0] != hidden
    config = AutoConfig.for_model(
        "dinov2_with_registers" if registers else "dinov2",
        hidden_size=vit.embed_dim,
        num_hidden_layers=len(vit.blocks),
        num_attention_heads=vit.blocks[0].attn.num_heads,
        # transformers multiplies the ratio of a SwiGLU by two thirds.
        mlp_ratio=round(hidden * (1.5 if swiglu else 1) / vit.embed_dim),
        use_swiglu_ffn=swiglu,
        layer_norm_eps=vit.norm.eps,
        image_size=rows * architecture.patch_size,
        patch_size=architecture.patch_size,
        architectures=["Dinov2WithRegistersModel" if registers else "Dinov2Model"],
        **registers,
    )
    pixels = BitImageProcessor(
        do_resize=False,
        do_center_crop=False,
        image_mean=[value / 255 for value in architecture.pixel_mean],
        image_std=[value / 255 for value in architecture.pixel_std],
    )
    _write_weights(to_transformers(model.vit), folder)
    config.save_pretrained(folder)
    pixels.save_pretrained(folder)


def write_detectron2(model: TunedModel, folder: Path) -> None:
    """Writes ``model.pth``, the whole segmentation model, for MODEL.WEIGHTS, and its config.yaml.

    The config is that of the run's record. Without a record only the weights are written.

    Raises:
        ValueError: if there is no decoder, or ``folder`` is that of a run.
    """
    if not model.decoder:
        raise ValueError(
            "the layout detectron2 is the whole segmentation model, and this delta holds the "
            "backbone alone: write the delta with --decoder, or this layout from the run"
        )
    if (folder / "last_checkpoint").is_file():
        raise ValueError(
            f"{folder} is the OUTPUT_DIR of a run, whose config.yaml this layout would replace: "
            "name another folder with --output"
        )
    record = RunRecord.of_checkpoint(model.record)
    vit = {BACKBONE + name: tensor for name, tensor in model.vit.items()}
    folder.mkdir(parents=True, exist_ok=True)
    if record is not None:
        # A head reads the names of the classes from the training set, which others do not have.
        texts = ["MODEL.TEXT.CLASSES", list(record.texts)] if record.texts else []
        cfg = changed(record.applied_to(default_config()), texts)
        (folder / "config.yaml").write_text(cfg.dump())
    with whole_file(folder / "model.pth") as temporary:
        torch.save({"model": vit | model.decoder, **model.record}, temporary)


def _input_size(timm_args: Mapping[str, Any]) -> dict[str, list[int]]:
    """The size of the images for which positions are stored; a ConvNeXt has none."""
    return {"input_size": [3, *timm_args["img_size"]]} if "img_size" in timm_args else {}


def _is_dinov2(timm_name: str) -> bool:
    return timm_name.partition(".")[0].endswith("_dinov2")


def _write_weights(state: StateDict, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with whole_file(folder / "model.safetensors") as temporary:
        save_file(state, temporary, metadata={"format": "pt"})


LAYOUTS: dict[str, Callable[[TunedModel, Path], None]] = {
    "timm": write_timm,
    "transformers": write_transformers,
    "detectron2": write_detectron2,
}
