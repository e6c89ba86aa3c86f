"""The config keys that define a run, and the results that depend on each."""

from collections.abc import Mapping
from enum import Flag, auto
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode

from fishertune_d2.config import equal_values
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.fisher.schedule import RENAMED_SCHEDULES
from fishertune_d2.tuning import build_tuning_method
from fishertune_d2.unread_keys import why_unread


class Result(Flag):
    """Results that depend on a key, beside the trained weights, which depend on every key here."""

    TRAINED = 0
    PREDICTIONS = auto()  # of trained weights that are given
    WARMUP = auto()  # the weights at the end of the warm-up
    ESTIMATE = auto()  # the Fisher estimate


_WARMUP = Result.WARMUP | Result.ESTIMATE  # the estimate starts from the warm-up
_MODEL = _WARMUP | Result.PREDICTIONS

# The first pattern that fits a key counts. A key with None, or without a pattern, defines no run.
_RESULTS: dict[str, Result | None] = {
    # Places of files, devices, times of saving, and sizes that only test images have.
    "FISHER.ESTIMATE": None,
    "INPUT.M??_SIZE_TEST": None,
    "MODEL.DEVICE": None,
    "MODEL.TEXT.WEIGHTS": None,
    "MODEL.VFM.CHECKPOINT_BLOCKS": None,
    "MODEL.VFM.WEIGHTS": None,
    "MODEL.WEIGHTS": None,
    "SOLVER.CHECKPOINT_PERIOD": None,
    "SELF_TRAINING.IMAGES": None,
    "SOLVER.KEEP_CHECKPOINTS": None,
    "TUNING.WARMUP_CHECKPOINT": None,
    # Only the losses of training read these.
    "MODEL.MASK_FORMER.*_RATIO": _WARMUP,
    "MODEL.MASK_FORMER.*_WEIGHT": _WARMUP,
    "MODEL.MASK_FORMER.DEEP_SUPERVISION": _WARMUP,
    "MODEL.MASK_FORMER.DROPOUT": _WARMUP,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": _WARMUP,
    "MODEL.SEM_SEG_HEAD.LOSS_*": _WARMUP,
    "MODEL.TEXT.*_WEIGHT": _WARMUP,
    # Where the training set is not registered, a config has to spell out its classes.
    "MODEL.TEXT.CLASSES": _WARMUP,
    # Only the first loading of public weights reads this.
    "MODEL.VFM.PATCH_RESIZE": _WARMUP,
    "MODEL.*": _MODEL,
    "INPUT.FORMAT": _MODEL,
    "INPUT.*": _WARMUP,
    "DATALOADER.REPEAT_THRESHOLD": _WARMUP,
    "DATALOADER.RARE_CLASS_*": _WARMUP,
    "DATALOADER.SAMPLER_TRAIN": _WARMUP,
    "DATASETS.TRAIN": _WARMUP,
    "SEED": _WARMUP,
    # Self-training begins with the tuning stage.
    "SELF_TRAINING.*": Result.TRAINED,
    # Averages begin with the tuning stage or later, and move no weight.
    "SOLVER.EMA": Result.TRAINED,
    "SOLVER.EMA_START": Result.TRAINED,
    # The weight decay falls in the tuning stage.
    "SOLVER.WEIGHT_DECAY_END": Result.TRAINED,
    # The learning rate of the backbone, which a warm-up freezes.
    "SOLVER.BACKBONE_MULTIPLIER": Result.TRAINED,
    "SOLVER.*": _WARMUP,
    # A score is computed from the estimate, which does not depend on these.
    "FISHER.FORM": Result.TRAINED,
    "FISHER.RHO": Result.TRAINED,
    "FISHER.GAMMA": Result.TRAINED,
    "FISHER.TAU": Result.TRAINED,
    "FISHER.EPS": Result.TRAINED,
    "FISHER.*": Result.ESTIMATE,
    "TUNING.WARMUP_ITERS": _WARMUP,
    "TUNING.METHOD": Result.PREDICTIONS,
    # The options of one method, such as TUNING.LORA.RANK.
    "TUNING.*.*": Result.PREDICTIONS,
    # The share of selected weights, and how it grows.
    "TUNING.*": Result.TRAINED,
}


def results_of(key: str) -> Result | None:
    """The results that change with a key's value; None if the key defines no run."""
    return next((r for pattern, r in _RESULTS.items() if fnmatchcase(key, pattern)), None)


def changes(key: str, result: Result) -> bool:
    """Whether ``result`` changes with a key's value."""
    return result in (results_of(key) or Result.TRAINED)


def defining_keys(cfg: CfgNode) -> dict[str, Any]:
    """The values of the keys that define the run of a config, by key with dots."""
    # Without keys that nothing reads with this config, and options of other methods.
    options = build_tuning_method(cfg).options
    return {
        key: value
        for key, value in dotted_items(cfg)
        if results_of(key) is not None
        and why_unread(key, cfg) is None
        and not (
            options is not None
            and fnmatchcase(key, "TUNING.*.*")
            and key.split(".")[1] not in options
        )
    }


def differing_keys(
    then: Mapping[str, Any], now: Mapping[str, Any], result: Result = Result.TRAINED
) -> dict[str, tuple[Any, Any]]:
    """The keys that change ``result`` and whose values differ, with the value then and now."""
    # Keys that only one of the two has, as after an update of this package, are not compared.
    return {
        key: (value, now[key])
        for key, value in then.items()
        if changes(key, result) and key in now and not _equal(key, value, now[key])
    }


def _equal(key: str, one: Any, other: Any) -> bool:
    if key == "TUNING.SCHEDULE":  # a value may have got a new name since
        one, other = (RENAMED_SCHEDULES.get(value, value) for value in (one, other))
    return equal_values(one, other)


def as_words(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Names each key that :func:`differing_keys` found, with its value then and now."""
    return [f"{key} was {then!r} and is {now!r}" for key, (then, now) in differing.items()]
