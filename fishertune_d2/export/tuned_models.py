"""Reads tuned models from runs and deltas, and makes deltas of runs."""

import json
from dataclasses import replace
from pathlib import Path
from textwrap import shorten
from typing import Any, cast

import torch
from detectron2.config import CfgNode

from fishertune_d2.config import read_config
from fishertune_d2.engine.evaluation_hook import BEST
from fishertune_d2.engine.parameter_counts import count_parameters
from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.modeling import VFMS, VFMBackbone
from fishertune_d2.modeling.vfm_table import Pixels, pixel_statistics
from fishertune_d2.run import Run
from fishertune_d2.tuning import build_tuning_method

from .delta import Architecture, Delta, apply_delta
from .layouts import BACKBONE, TunedModel, empty_backbone
from .model_card import ModelCard

# The parts of a checkpoint that describe its run; a delta with the decoder keeps them.
_RECORD = ("run", "iteration")
_CARD = "card"  # the note of a delta with its model card


def delta_of_run(
    source: str | Path,
    *,
    config_file: str | Path | None = None,
    base: str = "",
    decoder: bool = False,
) -> Delta:
    """Returns the delta of a run's backbone to the public weights from which it started.

    Missing files raise a FileNotFoundError. Files that cannot be read, public weights that cannot
    be found, and additions of a method that cannot be merged raise a ValueError.

    Args:
        source: an OUTPUT_DIR (its ``model_final.pth``), or a checkpoint.
        config_file: the run's config; by default ``config.yaml`` beside the checkpoint.
        base: the public weights, as MODEL.VFM.WEIGHTS; by default those that the config names.
        decoder: include the rest of the segmentation model, whole.

    Raises:
        ValueError: if the run started from random weights, or if more weights differ than it
            trained.
    """
    cfg, record, tuned = _read_run(Path(source), config_file)
    weights = base or cfg.MODEL.VFM.WEIGHTS
    if weights == "random":
        raise ValueError(
            'MODEL.VFM.WEIGHTS is "random": the run started from no public weights, and a delta is '
            "a difference to these. Name them with --base, or write plain files"
        )
    backbone = _public_backbone(tuned.architecture, weights, cfg.MODEL.VFM.PATCH_RESIZE)
    vit = backbone.vit.state_dict()
    delta = Delta.between(
        vit, tuned.vit, tuned.architecture, _resized(backbone, tuned.architecture)
    )
    trained = _count_movable(cfg)
    if delta.changed > trained:
        raise ValueError(
            f"{delta.changed:,} weights in {source} differ from the public ones, but the run "
            f"({cfg.TUNING.METHOD}) trained at most {trained:,}: it started from other weights "
            f"than {backbone.weights}. Name its own with --base"
        )
    found = Path(backbone.weights)
    # A file's name without its folder, which exists on this machine only.
    delta.notes[_CARD] = tuned.card.dumps()
    delta.notes["weights"] = found.name if found.is_file() else backbone.weights
    if record:
        iterations = record.iterations or cfg.SOLVER.MAX_ITER
        delta.notes["method"] = cfg.TUNING.METHOD
        delta.notes |= {"iterations": str(iterations), "seed": str(cfg.SEED)}
    if decoder:
        delta.decoder = tuned.decoder
        delta.notes |= {key: json.dumps(value) for key, value in tuned.record.items()}
    return delta


def read_tuned(
    source: str | Path, *, config_file: str | Path | None = None, base: str = ""
) -> TunedModel:
    """Returns the whole weights of a run, or of a delta (``.safetensors``) and the public weights.

    For a run see :func:`delta_of_run`, for a delta and its ``base`` :func:`tuned_backbone`, about
    errors too. The decoder is empty for a delta without one.
    """
    source = Path(source)
    if source.suffix != ".safetensors":
        return _read_run(source, config_file)[-1]
    delta = Delta.load(source)
    vit = tuned_backbone(delta, base).vit.state_dict()
    record = {key: json.loads(delta.notes[key]) for key in _RECORD if key in delta.notes}
    card = ModelCard.loads(delta.notes[_CARD]) if _CARD in delta.notes else ModelCard()
    return TunedModel(delta.architecture, vit, delta.decoder, record, card)


def tuned_backbone(delta: Delta | str | Path, weights: str = "") -> VFMBackbone:
    """Returns a delta's backbone: its public weights, with the delta applied.

    ``weights`` are the public ones, as MODEL.VFM.WEIGHTS. A damaged delta raises a ValueError, and
    so do public weights that are missing or other ones.
    """
    if not isinstance(delta, Delta):
        delta = Delta.load(delta)
    backbone = _public_backbone(delta.architecture, weights)
    apply_delta(backbone, delta)
    return backbone


def _public_backbone(
    architecture: Architecture, weights: str, patch_resize: str = "bicubic"
) -> VFMBackbone:
    try:
        return VFMBackbone(
            name=architecture.vfm,
            weights=weights,
            img_size=architecture.img_size,
            patch_size=architecture.patch_size,
            patch_resize=patch_resize,
        )
    except (FileNotFoundError, RuntimeError) as error:
        raise ValueError(
            f"{error}\n(For an export, --base FILE stands for MODEL.VFM.WEIGHTS.)"
        ) from error


def _resized(backbone: VFMBackbone, architecture: Architecture) -> set[str]:
    """Returns the names of the tensors whose size differs from the public one."""
    vfm = VFMS[architecture.vfm]
    size = (vfm.img_size, vfm.img_size)
    public = empty_backbone(replace(architecture, img_size=size, patch_size=vfm.patch_size)).vit
    shapes = {name: tensor.shape for name, tensor in public.state_dict().items()}
    names = {name for name, t in backbone.vit.state_dict().items() if t.shape != shapes[name]}
    if "pos_embed" not in shapes:
        return names
    # 16 x 16 and 8 x 32 positions have one shape.
    same_grid = public.patch_embed.grid_size == backbone.vit.patch_embed.grid_size
    return names if same_grid else names | {"pos_embed"}


def _read_run(
    source: Path, config_file: str | Path | None
) -> tuple[CfgNode, RunRecord | None, TunedModel]:
    """Reads the config, the record and the weights of a run, with merged additions."""
    run = Run(source if source.is_dir() else source.parent)
    checkpoint = run.checkpoint if source.is_dir() else source
    config_file = Path(config_file or run.config_file)
    if checkpoint.name == f"{BEST}.pth" and not checkpoint.is_file():
        raise FileNotFoundError(
            f"there is no {checkpoint}: a training keeps the best of its checkpoints if "
            "TEST.EVAL_PERIOD and TEST.BEST_ON are set; name the run's OUTPUT_DIR for the last"
        )
    for file, option in ((checkpoint, "another checkpoint"), (config_file, "--config-file")):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}: name the run's OUTPUT_DIR, or {option}")
    # No test set: one that is registered here may have other classes, which no export needs.
    cfg = read_config(str(config_file), ["MODEL.DEVICE", "cpu", "DATASETS.TEST", "()"])
    try:
        model = build_trained(cfg, str(checkpoint))
    except ValueError as error:
        raise ValueError(
            f"{error} (the config is {config_file}: name the run's own with --config-file)"
        ) from error
    record = cast(RunRecord | None, model.trained_by)
    if record is not None:
        cfg = record.applied_to(cfg)
    backbone = model.get_submodule("backbone")
    if getattr(backbone, "attached", False):
        try:
            build_tuning_method(cfg).merge(backbone)
        except ValueError as error:
            raise ValueError(
                f"{checkpoint} cannot be exported: {shorten(str(error), 400)}"
            ) from error
    state = model.state_dict()
    tuned = TunedModel(
        _architecture(cfg),
        vit={n.removeprefix(BACKBONE): t for n, t in state.items() if _of_encoder(n)},
        decoder={n: t for n, t in state.items() if not _of_encoder(n)},
        record={} if record is None else _parts(record),
        card=ModelCard.of_run(run, checkpoint, record),
    )
    return cfg, record, tuned


def _of_encoder(name: str) -> bool:
    """Whether a tensor belongs to the ViT; CLIP's head in it serves the decoder alone."""
    return name.startswith(BACKBONE) and not name.startswith(f"{BACKBONE}head.")


def _parts(record: RunRecord) -> dict[str, Any]:
    """Returns the parts of a checkpoint that describe its run."""
    done = {} if record.iterations is None else {"iteration": record.iterations - 1}
    return {"run": record.state_dict(), **done}


def _count_movable(cfg: CfgNode) -> int:
    """Counts the public weights that a run may have changed."""
    method = build_tuning_method(cfg)
    if not method.adds:
        # Of the config's own backbone, in which the final norm may train too.
        return count_parameters(cfg)["tuned_parameters"]
    empty = empty_backbone(_architecture(cfg))
    counts = {name: p.numel() for name, p in empty.named_parameters()}
    with torch.device("meta"):
        method.attach(empty)
    # A weight that an addition is merged into has another name while the addition is attached.
    for name, _ in empty.named_parameters():
        counts.pop(name, None)
    return sum(counts.values())


def _architecture(cfg: CfgNode) -> Architecture:
    vfm = cfg.MODEL.VFM
    configured = Pixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    mean, std = pixel_statistics(vfm.NAME, vfm.PIXELS, configured)
    of_table = VFMS[vfm.NAME]
    return Architecture(
        vfm=vfm.NAME,
        timm_name=of_table.timm_name,
        img_size=tuple(vfm.IMG_SIZE),
        patch_size=of_table.family.patch_size(vfm.PATCH_SIZE, of_table.patch_size),
        pixel_mean=(mean[0], mean[1], mean[2]),
        pixel_std=(std[0], std[1], std[2]),
    )
