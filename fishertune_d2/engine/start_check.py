"""Refuses at the start whatever the config, the files and the machine already rule out.

A run that would fail after its warm-up, or in the test after its last iteration, fails here.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.config import require_choice
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.data import require_ignore_value
from fishertune_d2.data.protocols import Protocol
from fishertune_d2.evaluation.evaluator import CLASS_RULES
from fishertune_d2.fisher import ALLOCATIONS, ESTIMATORS, LABELS, STEPS, UNITS, count_of_share
from fishertune_d2.fisher.perturb import EPS_MODES
from fishertune_d2.fisher.score import FORMS
from fishertune_d2.tuning import SelectiveMethod, TuningMethod, build_tuning_method

from .optimizer import OPTIMIZERS
from .parameter_counts import build_empty
from .perturbation import FEATURES, KINDS_OF_SHIFT
from .precision import ESTIMATE_DTYPES
from .self_training import self_training_troubles
from .stages import attach, planned_share, units_of

# The values that keys can have, in training and in evaluation.
_SCORING_CHOICES = {"INPUT.FORMAT": ("RGB", "BGR"), "TEST.CLASS_RULE": CLASS_RULES}
# The values of keys that only training reads.
_TRAINING_CHOICES: dict[str, Iterable[str]] = {
    "FISHER.ESTIMATOR": ESTIMATORS,
    "FISHER.FORM": FORMS,
    "FISHER.LABELS": LABELS,
    "FISHER.PRECISION": ESTIMATE_DTYPES,
    "FISHER.PERTURB.EPS_MODE": EPS_MODES,
    "FISHER.PERTURB.KIND": KINDS_OF_SHIFT,
    "INPUT.RANDOM_FLIP": ("horizontal", "vertical", "none"),
    # Detectron2's, and its DeepLab project's.
    "SOLVER.LR_SCHEDULER_NAME": (
        "WarmupPolyLR",
        "WarmupCosineLR",
        "WarmupMultiStepLR",
        "WarmupStepWithFixedGammaLR",
    ),
    "SOLVER.OPTIMIZER": OPTIMIZERS,
    "SOLVER.WARMUP_METHOD": ("constant", "linear"),
    "TUNING.ALLOCATION": ALLOCATIONS,
    "TUNING.STEPS": STEPS,
    "TUNING.UNIT": UNITS,
}
# The number of FISHER.PERTURB.POINTS: the patch embedding, and the blocks at 1/3, 1/2 and 2/3.
_POINTS = 4


def require_possible(cfg: CfgNode, processes: int = 1) -> None:
    """Refuses a config by its values alone, in one error that names everything wrong in it."""
    require_scorable(cfg)
    method = build_tuning_method(cfg)
    troubles = [*_schedule(cfg, method), *_decays(cfg), *_choices(cfg)]
    troubles += [*_sizes(cfg, processes), *_best(cfg), *self_training_troubles(cfg)]
    if method.selects and cfg.TUNING.WARMUP_ITERS < cfg.SOLVER.MAX_ITER:
        troubles += _shift(cfg, method)
    if troubles:
        raise ValueError("\n".join(troubles))


def require_scorable(cfg: CfgNode) -> None:
    """Checks the keys that training and evaluation have in common."""
    require_ignore_value(cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    values = dict(dotted_items(cfg))
    for key, known in _SCORING_CHOICES.items():
        require_choice(key, values[key], known)
    Protocol.from_config(cfg)  # refuses keys that contradict TEST.PROTOCOL


def require_file(key: str, file: str) -> None:
    """Refuses a file that a key names and that is not there; Detectron2 checks addresses."""
    if not file or "://" in file:
        return
    if Path(file).is_dir():
        raise FileNotFoundError(f"{key} is {file}, a folder: name a file in it")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{key} is {file}, and there is no such file")


def require_device(device: str) -> None:
    """Refuses a MODEL.DEVICE that PyTorch does not find."""
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"MODEL.DEVICE is {device!r}: choose cuda, cuda:1 or cpu") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"MODEL.DEVICE is {device!r}, and PyTorch finds no GPU: add MODEL.DEVICE cpu to the "
            "command (--opts MODEL.DEVICE cpu for predict), or run python -m fishertune_d2.doctor"
        )


def require_fillable(cfg: CfgNode, method: TuningMethod, backbone: nn.Module) -> None:
    """Refuses a TUNING.D_MAX above all weights to choose from, or below those of one unit."""
    if not isinstance(method, SelectiveMethod):
        return
    tuning, base = cfg.TUNING, sum(p.numel() for p in backbone.parameters())
    share = planned_share(cfg)
    count = count_of_share(share, base)
    units = units_of(cfg, method, backbone)
    selectable = method.selectable(backbone, units).items()
    most = sum(int(which.sum()) * units.groups[group].size for group, which in selectable)
    if count > most:
        raise ValueError(
            f"TUNING.METHOD {tuning.METHOD} chooses among {most:,} weights, and would tune "
            f"{count:,} in the end, a share of {share:.4g} of the backbone's {base:,} "
            f"(TUNING.D_MIN {tuning.D_MIN}, TUNING.D_MAX {tuning.D_MAX}, TUNING.SCHEDULE "
            f"{method.schedule or tuning.SCHEDULE}): tune a share of at most "
            f"{int(10_000 * most / base) / 10_000}"
        )
    largest = max(group.size for group in units.groups.values())
    if 0 < count < largest:
        raise ValueError(
            f"TUNING.METHOD {tuning.METHOD} would tune {count:,} weights in the end, and a "
            f"{tuning.UNIT} has up to {largest:,}: raise TUNING.D_MAX, or "
            "set TUNING.UNIT to weight"
        )


def require_attachable(cfg: CfgNode, method: TuningMethod) -> None:
    """Refuses a method that cannot add its weights to this backbone and this head."""
    if method.adds:
        attach(build_empty(cfg, build_model), method)  # another model: the warm-up is without


def _schedule(cfg: CfgNode, method: TuningMethod) -> Iterator[str]:
    solver, tuning = cfg.SOLVER, cfg.TUNING
    if cfg.SEED < 0:
        yield (
            f"SEED is {cfg.SEED}: choose at least 0. The order of the data and all random numbers "
            "depend on it, and a run without a seed could not be resumed"
        )
    if not 0 <= tuning.WARMUP_ITERS <= solver.MAX_ITER:
        yield (
            f"TUNING.WARMUP_ITERS is {tuning.WARMUP_ITERS}: choose at least 0 and at most "
            f"SOLVER.MAX_ITER, {solver.MAX_ITER}"
        )
    if method.selects and not method.estimates and tuning.STEPS == "fisher":
        yield (
            f"TUNING.STEPS is fisher, but TUNING.METHOD {tuning.METHOD} estimates no Fisher "
            "information: set TUNING.STEPS to equal"
        )
    if method.selects:
        try:
            planned_share(cfg)
        except ValueError as error:
            yield f"TUNING.SCHEDULE, TUNING.D_MIN and TUNING.D_MAX do not fit: {error}"


def _decays(cfg: CfgNode) -> Iterator[str]:
    solver = cfg.SOLVER
    if solver.EMA and not 0.5 <= solver.EMA < 1:
        yield f"SOLVER.EMA is {solver.EMA}: choose a decay from 0.5 to below 1, or 0 for no average"
    if solver.EMA and not 0 <= solver.EMA_START < solver.MAX_ITER:
        yield (
            f"SOLVER.EMA_START is {solver.EMA_START}: choose an iteration from 0 to below "
            f"SOLVER.MAX_ITER, {solver.MAX_ITER}"
        )
    end = solver.WEIGHT_DECAY_END
    if end is not None and (end < 0 or solver.WEIGHT_DECAY <= 0):
        yield (
            f"SOLVER.WEIGHT_DECAY_END is {end} and SOLVER.WEIGHT_DECAY {solver.WEIGHT_DECAY}: "
            "choose an end of at least 0 and a start above 0, or leave WEIGHT_DECAY_END out"
        )


def _choices(cfg: CfgNode) -> Iterator[str]:
    choices, values = dict(_TRAINING_CHOICES), dict(dotted_items(cfg))
    if cfg.SOLVER.CLIP_GRADIENTS.ENABLED:
        choices["SOLVER.CLIP_GRADIENTS.CLIP_TYPE"] = ("full_model", "norm", "value")
    for key, known in choices.items():
        try:
            require_choice(key, values[key], known)
        except ValueError as error:
            yield str(error)
    points = cfg.FISHER.PERTURB.POINTS
    if not points or not set(points) <= set(range(_POINTS)):
        yield f"FISHER.PERTURB.POINTS is {list(points)}: choose from 0 to {_POINTS - 1}"


def _best(cfg: CfgNode) -> Iterator[str]:
    test, sets = cfg.TEST, cfg.DATASETS.TEST
    if test.BEST_ON and (test.BEST_ON not in sets or not test.EVAL_PERIOD):
        yield (
            f"TEST.BEST_ON is {test.BEST_ON!r}, DATASETS.TEST {tuple(sets)} and TEST.EVAL_PERIOD "
            f"{test.EVAL_PERIOD}: name a data set of DATASETS.TEST, and a period above 0 in which "
            "it is scored"
        )


def _sizes(cfg: CfgNode, processes: int) -> Iterator[str]:
    images = cfg.SOLVER.IMS_PER_BATCH
    crop, edges = cfg.INPUT.CROP, cfg.INPUT.MIN_SIZE_TRAIN
    period, warmup = cfg.SOLVER.CHECKPOINT_PERIOD, cfg.TUNING.WARMUP_CHECKPOINT
    if crop.ENABLED and not _positive(crop.SIZE, count=2):
        yield f"INPUT.CROP.SIZE is {list(crop.SIZE)}: give a height and a width in pixels"
    if not _positive(edges):
        yield f"INPUT.MIN_SIZE_TRAIN is {list(edges)}: give at least one short edge in pixels"
    if period < 1:
        yield f"SOLVER.CHECKPOINT_PERIOD is {period}: choose at least 1 iteration"
    if cfg.SOLVER.KEEP_CHECKPOINTS < 0:
        yield (
            f"SOLVER.KEEP_CHECKPOINTS is {cfg.SOLVER.KEEP_CHECKPOINTS}: choose how many periodic "
            "checkpoints stay, or 0 for all"
        )
    if warmup and cfg.MODEL.WEIGHTS:
        yield (
            f"TUNING.WARMUP_CHECKPOINT {warmup} and MODEL.WEIGHTS {cfg.MODEL.WEIGHTS} both say "
            "where training starts: leave one of them empty"
        )
    if images < 1 or images % processes:
        yield (
            f"A batch of {images} images (SOLVER.IMS_PER_BATCH) cannot be shared evenly by "
            f"{processes} processes: choose a multiple, and scale the learning rate and the steps "
            "with it, as configs/8gpu/Base-8gpu.yaml does; or let SOLVER.REFERENCE_WORLD_SIZE "
            f"{max(1, images)} scale all of them"
        )


def _positive(sizes: Sequence[int], count: int | None = None) -> bool:
    return bool(sizes) and min(sizes) >= 1 and len(sizes) == (count or len(sizes))


def _shift(cfg: CfgNode, method: TuningMethod) -> Iterator[str]:
    fisher = cfg.FISHER
    if fisher.ESTIMATE or not method.estimates:
        return
    by_features = method.compares_domains and fisher.PERTURB.KIND == FEATURES
    if fisher.BATCHES < 1 or fisher.IMS_PER_BATCH < 1:
        yield (
            f"FISHER.BATCHES is {fisher.BATCHES} and FISHER.IMS_PER_BATCH {fisher.IMS_PER_BATCH}: "
            "choose at least 1"
        )
    elif by_features and fisher.IMS_PER_BATCH < 2:
        yield (
            f"FISHER.IMS_PER_BATCH is {fisher.IMS_PER_BATCH}: Eq. 6 takes its statistics over the "
            "images of a batch, so with one image nothing shifts and F(x') = F(x): choose at least "
            "2"
        )
    if by_features and fisher.PERTURB.STRENGTH == 0:
        yield (
            f"FISHER.PERTURB.STRENGTH is 0, so F(x') = F(x), and TUNING.METHOD "
            f"{cfg.TUNING.METHOD} compares the two: choose a strength above 0, or TUNING.METHOD "
            "fisher, which needs F(x) alone"
        )
