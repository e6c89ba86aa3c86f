"""Reads what a run wrote, finds the public weights it started from, and puts deltas on them."""

import json
from pathlib import Path
from textwrap import shorten

import timm
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from yaml import YAMLError

from fishertune_d2.config import read_config
from fishertune_d2.engine.parameter_counts import build_empty, count_parameters
from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.modeling import VFM, VFMS, VFMBackbone
from fishertune_d2.modeling.weight_files import read_with_notes
from fishertune_d2.modeling.vfm_table import Pixels, pixel_statistics
from fishertune_d2.tuning import TuningMethod, build_tuning_method

from .delta import Architecture, Delta, StateDict, apply_delta
from .plain import BACKBONE, TunedModel, empty_backbone

# What the names of the backbone's tensors, and of those added to it, begin with in a checkpoint.
_OWN = "backbone."
# What a checkpoint says of its run, and a delta with the decoder takes along.
_RECORD = ("run", "iteration")


def delta_of_run(
    source: str | Path,
    *,
    config_file: str | Path | None = None,
    base: str = "",
    decoder: bool = False,
) -> Delta:
    """The difference between a run's backbone and the public weights that it started from.

    Args:
        source: an OUTPUT_DIR, of which ``model_final.pth`` is taken, or a checkpoint.
        config_file: the run's; by default ``config.yaml`` beside the checkpoint.
        base: the public weights, as MODEL.VFM.WEIGHTS; by default those that the config names.
        decoder: take in the rest of the segmentation model, whole.

    Raises:
        FileNotFoundError: if the checkpoint or the config is not there.
        ValueError: if one cannot be read, if what the run added cannot be merged, if the public
            weights are not found, or if more differs from them than the run trained.
    """
    cfg, record, tuned = _read_run(Path(source), config_file)
    weights = base or cfg.MODEL.VFM.WEIGHTS
    if weights == "random":
        raise ValueError(
            'MODEL.VFM.WEIGHTS is "random": the run started from no public weights, and a delta is '
            "a difference to these. Name them with --base, or write plain files"
        )
    backbone = _public_backbone(tuned.architecture, weights, cfg.MODEL.VFM.PATCH_RESIZE)
    resized = _resized(backbone, VFMS[tuned.architecture.vfm])
    delta = Delta.between(backbone.vit.state_dict(), tuned.vit, tuned.architecture, resized)
    trained = _count_movable(cfg, backbone)
    if delta.changed > trained:
        raise ValueError(
            f"{delta.changed:,} weights in {source} differ from the public ones, but the run "
            f"({cfg.TUNING.METHOD}) trained at most {trained:,}: it started from other weights "
            f"than {backbone.weights}. Name its own with --base"
        )
    if decoder:
        delta.decoder = tuned.decoder
    found = Path(backbone.weights)
    delta.notes = {
        # Of a path, the name: the folders are this machine's.
        "weights": found.name if found.is_file() else backbone.weights,
        **(_facts(cfg, record) if record else {}),
    }
    if decoder and record:
        delta.notes |= {key: json.dumps(value) for key, value in tuned.record.items()}
    return delta


def read_tuned(
    source: str | Path, *, config_file: str | Path | None = None, base: str = ""
) -> TunedModel:
    """The whole weights of a run, or of a delta and the public weights.

    Args:
        source: an OUTPUT_DIR, a checkpoint, or a delta (``.safetensors``).
        config_file: for a run, see :func:`delta_of_run`.
        base: for a delta, see :func:`tuned_backbone`.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file cannot be read, they do not fit each other, or what a run added cannot
            be merged.
    """
    source = Path(source)
    if source.suffix != ".safetensors":
        return _read_run(source, config_file)[-1]
    delta = Delta.load(source)
    vit = tuned_backbone(delta, base).vit.state_dict()
    record = {key: json.loads(delta.notes[key]) for key in _RECORD if key in delta.notes}
    return TunedModel(delta.architecture, vit, delta.decoder, record)


def tuned_backbone(delta: Delta | str | Path, weights: str = "") -> VFMBackbone:
    """Builds a delta's backbone with its public weights, and applies the delta.

    Args:
        delta: or the file of one.
        weights: the public weights, as MODEL.VFM.WEIGHTS.

    Raises:
        ValueError: if the delta is damaged, or the public weights are not found or not its own.
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


def _facts(cfg: CfgNode, record: RunRecord) -> dict[str, str]:
    """How a run was trained, as its checkpoint says."""
    return {
        "method": cfg.TUNING.METHOD,
        "iterations": str(record.iterations or cfg.SOLVER.MAX_ITER),
        "seed": str(cfg.SEED),
    }


def _resized(backbone: VFMBackbone, row: VFM) -> set[str]:
    """Names of the tensors that have another size than the public ones."""
    sizes = {"img_size": row.img_size, "patch_size": row.patch_size}
    with torch.device("meta"):
        public = timm.create_model(row.timm_name, num_classes=0, **{**row.options, **sizes})
    shapes = {name: tensor.shape for name, tensor in public.state_dict().items()}
    names = {name for name, t in backbone.vit.state_dict().items() if t.shape != shapes[name]}
    # 16 x 16 positions and 8 x 32 are as many.
    same_grid = public.patch_embed.grid_size == backbone.vit.patch_embed.grid_size
    return names if same_grid else names | ({"pos_embed"} & shapes.keys())


def _read_run(
    source: Path, config_file: str | Path | None
) -> tuple[CfgNode, RunRecord | None, TunedModel]:
    """The config, the record and the weights of a run, which fit each other."""
    checkpoint = source / "model_final.pth" if source.is_dir() else source
    config_file = Path(config_file or checkpoint.with_name("config.yaml"))
    for file, option in ((checkpoint, "another checkpoint"), (config_file, "--config-file")):
        if not file.is_file():
            raise FileNotFoundError(f"there is no {file}: name the run's OUTPUT_DIR, or {option}")
    try:
        cfg = read_config(str(config_file))
    except (YAMLError, KeyError) as error:
        raise ValueError(f"{config_file} is no config of a run: {error}") from error
    state, notes = read_with_notes(checkpoint)
    record = RunRecord.of_checkpoint(notes)
    if record is not None:
        try:
            record.require_same_predictions(cfg)
        except ValueError as error:
            raise ValueError(f"{checkpoint}, {config_file}: {error}") from error
        cfg = record.applied_to(cfg)
    architecture = _architecture(cfg)
    method = build_tuning_method(cfg)
    if method.adds:
        try:
            state = _merged(architecture, method, state)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{checkpoint} cannot be exported: {shorten(str(error), 400)}"
            ) from error
    tuned = TunedModel(
        architecture,
        vit={n.removeprefix(BACKBONE): t for n, t in state.items() if n.startswith(BACKBONE)},
        decoder={n: t for n, t in state.items() if not n.startswith(BACKBONE)},
        record={key: notes[key] for key in _RECORD if record is not None and key in notes},
    )
    try:
        empty_backbone(tuned.architecture).vit.load_state_dict(tuned.vit, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{checkpoint} does not hold the backbone of {config_file}: "
            f"{shorten(str(error), 400)}. Name its own with --config-file"
        ) from error
    _require_decoder(cfg, tuned, checkpoint, config_file)
    return cfg, record, tuned


def _require_decoder(cfg: CfgNode, tuned: TunedModel, checkpoint: Path, config_file: Path) -> None:
    """Refuses a decoder that does not fill the segmentation model of the config."""
    own = build_empty(cfg, build_model).state_dict()
    wanted = {name: t.shape for name, t in own.items() if not name.startswith(BACKBONE)}
    wrong = [name for name in wanted if name not in tuned.decoder]
    wrong += [n for n, t in tuned.decoder.items() if n in wanted and t.shape != wanted[n]]
    if wrong:
        raise ValueError(
            f"{checkpoint} does not hold the decoder of {config_file}: {len(wrong)} of its "
            f"{len(wanted)} tensors are missing or of another shape, the first is {wrong[0]}. Name "
            "its own config with --config-file"
        )


def _merged(architecture: Architecture, method: TuningMethod, state: StateDict) -> StateDict:
    """The weights of a run, with what its method added written into the backbone's own.

    Raises:
        RuntimeError: if they do not fit the backbone as the method leaves it.
        ValueError: if the method cannot do that.
    """
    backbone = empty_backbone(architecture)
    own = {n.removeprefix(_OWN): t for n, t in state.items() if n.startswith(_OWN)}
    if own.keys() <= backbone.state_dict().keys():
        return state  # the warm-up's
    with torch.device("meta"):
        method.attach(backbone)
    fit = backbone.load_state_dict(own, strict=False, assign=True)
    method.merge(backbone)  # first, for where this is refused, nothing else matters
    if fit.missing_keys or fit.unexpected_keys:
        raise RuntimeError(
            f"it lacks {', '.join(fit.missing_keys) or 'nothing'} and has "
            f"{', '.join(fit.unexpected_keys) or 'nothing'} besides"
        )
    others = {name: tensor for name, tensor in state.items() if not name.startswith(_OWN)}
    return others | {_OWN + name: tensor for name, tensor in backbone.state_dict().items()}


def _count_movable(cfg: CfgNode, backbone: VFMBackbone) -> int:
    """How many of the public weights a run may have changed."""
    method = build_tuning_method(cfg)
    if not method.adds:
        return count_parameters(cfg, backbone)["tuned_parameters"]
    empty = empty_backbone(_architecture(cfg))
    counts = {name: p.numel() for name, p in empty.named_parameters()}
    with torch.device("meta"):
        method.attach(empty)
    # What the additions are merged into goes by another name while they are attached.
    for name, _ in empty.named_parameters():
        counts.pop(name, None)
    return sum(counts.values())


def _architecture(cfg: CfgNode) -> Architecture:
    vfm = cfg.MODEL.VFM
    if vfm.NAME not in VFMS:
        raise ValueError(f"MODEL.VFM.NAME is {vfm.NAME!r}; known are {', '.join(VFMS)}")
    configured = Pixels(cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD)
    pixels = pixel_statistics(vfm.NAME, vfm.PIXELS, configured)
    return Architecture(
        vfm=vfm.NAME,
        timm_name=VFMS[vfm.NAME].timm_name,
        img_size=tuple(vfm.IMG_SIZE),
        patch_size=vfm.PATCH_SIZE or VFMS[vfm.NAME].patch_size,
        pixel_mean=tuple(pixels.mean),
        pixel_std=tuple(pixels.std),
    )
