"""Refuses at the start what the config, the files and the machine already rule out.

A run that would fail after its warm-up, or in the test after its last iteration, fails here.
"""

from collections.abc import Iterator
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.data import require_ignore_value
from fishertune_d2.evaluation.evaluator import CLASS_RULES
from fishertune_d2.fisher import ESTIMATORS, LABELS, count_of_share, tuned_share
from fishertune_d2.fisher.perturb import EPS_MODES
from fishertune_d2.fisher.score import FORMS
from fishertune_d2.tuning import TuningMethod, build_tuning_method

from .parameter_counts import build_empty
from .precision import ESTIMATE_DTYPES
from .stages import attach

# Of Detectron2 and its DeepLab project.
_SCHEDULES = (
    "WarmupPolyLR",
    "WarmupCosineLR",
    "WarmupMultiStepLR",
    "WarmupStepWithFixedGammaLR",
)
# Of FISHER.PERTURB.POINTS: the patch embedding, and the blocks at 1/3, 1/2 and 2/3.
_POINTS = 4


def require_possible(cfg: CfgNode, processes: int = 1) -> None:
    """Checks what needs neither data, nor files, nor a model.

    Args:
        cfg: the run's config.
        processes: how many will share a batch.

    Raises:
        ValueError: one error for everything that is wrong, each with its key, value and remedy.
    """
    require_scorable(cfg)
    method = build_tuning_method(cfg)
    troubles = [*_schedule(cfg, method), *_choices(cfg), *_sizes(cfg)]
    troubles += _batches(cfg, processes)
    if method.selects and cfg.TUNING.WARMUP_ITERS < cfg.SOLVER.MAX_ITER:
        troubles += _shift(cfg, method)
    if troubles:
        raise ValueError("\n".join(troubles))


def require_scorable(cfg: CfgNode) -> None:
    """Checks what training and evaluation have in common.

    Raises:
        ValueError: with the key, its value and the remedy.
    """
    require_ignore_value(cfg.MODEL.SEM_SEG_HEAD.IGNORE_VALUE)
    for key, value, known in (
        ("INPUT.FORMAT", cfg.INPUT.FORMAT, ("RGB", "BGR")),
        ("TEST.CLASS_RULE", cfg.TEST.CLASS_RULE, CLASS_RULES),
    ):
        if value not in known:
            raise ValueError(f"{key} is {value!r}: choose from {', '.join(known)}")


def require_file(key: str, file: str) -> None:
    """Checks that a file is there that a key names; addresses are left to Detectron2.

    Raises:
        FileNotFoundError: with the key and the file.
    """
    if not file or "://" in file:
        return
    if Path(file).is_dir():
        raise FileNotFoundError(f"{key} is {file}, a folder: name a file in it")
    if not Path(file).is_file():
        raise FileNotFoundError(f"{key} is {file}, and there is no such file")


def require_fillable(cfg: CfgNode, method: TuningMethod, backbone: nn.Module) -> None:
    """Checks that a selective method has as many weights to choose from as it will tune.

    Args:
        cfg: TUNING is read.
        method: the run's tuning method.
        backbone: of the run's model.

    Raises:
        ValueError: with the largest TUNING.D_MAX that can be filled.
    """
    if not method.selects:
        return
    tuning, base = cfg.TUNING, sum(p.numel() for p in backbone.parameters())
    schedule = method.schedule or tuning.SCHEDULE
    share = tuned_share(1.0, tuning.D_MIN, tuning.D_MAX, schedule=schedule)
    count = count_of_share(share, base)
    most = sum(c.numel for c in method.candidates(backbone))
    if count > most:
        raise ValueError(
            f"TUNING.METHOD {tuning.METHOD} chooses among {most:,} weights, and would tune "
            f"{count:,} in the end, a share of {share:.4g} of the backbone's {base:,} "
            f"(TUNING.D_MIN {tuning.D_MIN}, TUNING.D_MAX {tuning.D_MAX}, TUNING.SCHEDULE "
            f"{schedule}): tune a share of at most {int(10_000 * most / base) / 10_000}"
        )


def require_attachable(cfg: CfgNode, method: TuningMethod) -> None:
    """Checks that a method that adds weights can add them to this backbone and this head.

    Args:
        cfg: the run's config.
        method: the run's tuning method.

    Raises:
        ValueError: of the method, with its reason.
    """
    if method.adds:
        attach(build_empty(cfg, build_model), method)  # another model: the warm-up is without


def _schedule(cfg: CfgNode, method: TuningMethod) -> Iterator[str]:
    solver, tuning = cfg.SOLVER, cfg.TUNING
    if cfg.SEED < 0:
        yield (
            f"SEED is {cfg.SEED}: choose one of at least 0, on which the order of the data and "
            "every random number depend; a run without one could not be resumed"
        )
    if not 0 <= tuning.WARMUP_ITERS <= solver.MAX_ITER:
        yield (
            f"TUNING.WARMUP_ITERS is {tuning.WARMUP_ITERS}: choose at least 0 and at most "
            f"SOLVER.MAX_ITER, {solver.MAX_ITER}"
        )
    if method.selects:
        try:
            schedule = method.schedule or tuning.SCHEDULE
            tuned_share(1.0, tuning.D_MIN, tuning.D_MAX, schedule=schedule)
        except ValueError as error:
            yield f"TUNING.SCHEDULE, TUNING.D_MIN and TUNING.D_MAX do not fit: {error}"


def _choices(cfg: CfgNode) -> Iterator[str]:
    fisher = cfg.FISHER
    for key, value, known in (
        ("FISHER.ESTIMATOR", fisher.ESTIMATOR, ESTIMATORS),
        ("FISHER.FORM", fisher.FORM, FORMS),
        ("FISHER.LABELS", fisher.LABELS, LABELS),
        ("FISHER.PRECISION", fisher.PRECISION, ESTIMATE_DTYPES),
        ("FISHER.PERTURB.EPS_MODE", fisher.PERTURB.EPS_MODE, EPS_MODES),
        ("INPUT.RANDOM_FLIP", cfg.INPUT.RANDOM_FLIP, ("horizontal", "vertical", "none")),
        ("SOLVER.LR_SCHEDULER_NAME", cfg.SOLVER.LR_SCHEDULER_NAME, _SCHEDULES),
        ("SOLVER.OPTIMIZER", cfg.SOLVER.OPTIMIZER, ("ADAMW", "SGD")),
        ("SOLVER.WARMUP_METHOD", cfg.SOLVER.WARMUP_METHOD, ("constant", "linear")),
    ):
        if value not in known:
            yield f"{key} is {value!r}: choose from {', '.join(known)}"
    clip, ways = cfg.SOLVER.CLIP_GRADIENTS, ("full_model", "norm", "value")
    if clip.ENABLED and clip.CLIP_TYPE not in ways:
        yield (
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}: choose from {', '.join(ways)}"
        )
    points = fisher.PERTURB.POINTS
    if not points or not set(points) <= set(range(_POINTS)):
        yield f"FISHER.PERTURB.POINTS is {list(points)}: choose from 0 to {_POINTS - 1}"


def _sizes(cfg: CfgNode) -> Iterator[str]:
    crop, edges = cfg.INPUT.CROP, cfg.INPUT.MIN_SIZE_TRAIN
    if crop.ENABLED and (len(crop.SIZE) != 2 or min(crop.SIZE) < 1):
        yield f"INPUT.CROP.SIZE is {list(crop.SIZE)}: give a height and a width in pixels"
    if not edges or min(edges) < 1:
        yield f"INPUT.MIN_SIZE_TRAIN is {list(edges)}: give at least one short edge in pixels"
    if cfg.SOLVER.CHECKPOINT_PERIOD < 1:
        yield (
            f"SOLVER.CHECKPOINT_PERIOD is {cfg.SOLVER.CHECKPOINT_PERIOD}: choose at least 1 "
            "iteration"
        )
    if cfg.TUNING.WARMUP_CHECKPOINT and cfg.MODEL.WEIGHTS:
        yield (
            f"TUNING.WARMUP_CHECKPOINT {cfg.TUNING.WARMUP_CHECKPOINT} and MODEL.WEIGHTS "
            f"{cfg.MODEL.WEIGHTS} both say where training starts: leave one of them empty"
        )


def _batches(cfg: CfgNode, processes: int) -> Iterator[str]:
    images = cfg.SOLVER.IMS_PER_BATCH
    if images < 1 or images % processes:
        yield (
            f"A batch of {images} images (SOLVER.IMS_PER_BATCH) cannot be shared evenly by "
            f"{processes} processes; choose a multiple."
        )


def _shift(cfg: CfgNode, method: TuningMethod) -> Iterator[str]:
    fisher = cfg.FISHER
    if fisher.ESTIMATE or not method.estimates:
        return
    if fisher.BATCHES < 1 or fisher.IMS_PER_BATCH < 1:
        yield (
            f"FISHER.BATCHES is {fisher.BATCHES} and FISHER.IMS_PER_BATCH {fisher.IMS_PER_BATCH}: "
            "choose at least 1"
        )
    elif method.compares_domains and fisher.IMS_PER_BATCH < 2:
        yield (
            f"FISHER.IMS_PER_BATCH is {fisher.IMS_PER_BATCH}: Eq. 6 takes its statistics over the "
            "images of a batch, so with one image nothing shifts and F(x') = F(x): choose at least "
            "2"
        )
    if method.compares_domains and fisher.PERTURB.STRENGTH == 0:
        yield (
            f"FISHER.PERTURB.STRENGTH is 0, so F(x') = F(x), and TUNING.METHOD "
            f"{cfg.TUNING.METHOD} compares the two: choose a strength above 0, or TUNING.METHOD "
            "fisher, which needs F(x) alone"
        )
