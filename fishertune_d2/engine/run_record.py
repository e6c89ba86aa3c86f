"""What a checkpoint remembers of the run that wrote it, and which later configs it fits.

A record travels with everything that a run leaves to other runs: its checkpoints, its warm-up
(TUNING.WARMUP_CHECKPOINT) and its Fisher estimate (FISHER.ESTIMATE).
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.config import equal_values
from fishertune_d2.data.labels import same_class
from fishertune_d2.tuning import build_tuning_method
from fishertune_d2.unread_keys import why_unread

# What a run is: with another value of a key below these, its result is another.
_DEFINING = (
    "DATALOADER.REPEAT_THRESHOLD",
    "DATALOADER.SAMPLER_TRAIN",
    "DATASETS.TRAIN",
    "FISHER",
    "INPUT",
    "MODEL",
    "SEED",
    "SOLVER",
    "TUNING",
)
# But for where files are, what computes, what is written when, and what only test images meet.
_FREE = (
    "FISHER.ESTIMATE",
    "INPUT.MAX_SIZE_TEST",
    "INPUT.MIN_SIZE_TEST",
    "MODEL.DEVICE",
    "MODEL.VFM.CHECKPOINT_BLOCKS",
    "MODEL.VFM.WEIGHTS",
    "MODEL.WEIGHTS",
    "SOLVER.CHECKPOINT_PERIOD",
    "TUNING.WARMUP_CHECKPOINT",
)
# Keys below MODEL that only the losses of training read, or the first loading of public weights.
_ONLY_IN_TRAINING = (
    "MODEL.MASK_FORMER.CLASS_WEIGHT",
    "MODEL.MASK_FORMER.DEEP_SUPERVISION",
    "MODEL.MASK_FORMER.DICE_WEIGHT",
    "MODEL.MASK_FORMER.DROPOUT",
    "MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO",
    "MODEL.MASK_FORMER.MASK_WEIGHT",
    "MODEL.MASK_FORMER.NO_OBJECT_WEIGHT",
    "MODEL.MASK_FORMER.OVERSAMPLE_RATIO",
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS",
    "MODEL.SEM_SEG_HEAD.LOSS_TYPE",
    "MODEL.SEM_SEG_HEAD.LOSS_WEIGHT",
    "MODEL.VFM.PATCH_RESIZE",
)
# The learning rate of the backbone, which a warm-up freezes.
BACKBONE_RATE = "SOLVER.BACKBONE_MULTIPLIER"
# How a score is made of an estimate; the estimate itself does not depend on it.
_SCORE_KEYS = ("FISHER.FORM", "FISHER.RHO", "FISHER.GAMMA", "FISHER.TAU", "FISHER.EPS")
# A warm-up of other values serves, but is not, to the bit, the one that this run would make.
_UNUSUAL = ("SOLVER.ACCUMULATE", "SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER")

# The name of the record among the notes of a Fisher estimate.
NOTE = "run"

# How many values of a tensor its fingerprint takes, at least, if it has as many.
_SAMPLED = 64

Keys = Callable[[str], bool]


def changes_predictions(key: str) -> bool:
    """Whether the trained model computes something else with another value of this key.

    Of TUNING these are the method and the options of the methods, which have groups of their own
    (TUNING.LORA and so on); the share of selected weights and its growth only matter in training.
    """
    if key.startswith("MODEL."):
        return key not in _ONLY_IN_TRAINING
    option = key.startswith("TUNING.") and key.count(".") > 1
    return option or key in ("INPUT.FORMAT", "TUNING.METHOD")


def changes_warmup(key: str) -> bool:
    """Whether the warm-up ends with other weights with another value of this key."""
    if key == "TUNING.WARMUP_ITERS":
        return True
    return not key.startswith(("FISHER.", "TUNING.")) and key != BACKBONE_RATE


def changes_estimate(key: str) -> bool:
    """Whether another Fisher estimate is measured with another value of this key."""
    return changes_warmup(key) or (key.startswith("FISHER.") and key not in _SCORE_KEYS)


@dataclass(frozen=True)
class RunRecord:
    """What a run was trained with.

    Attributes:
        config: the values of all keys that define the run, by key with dots.
        images: the number of training images; None if that is not known.
        names: a digest of their names, without folders; None if they are not known.
        classes: the names of the classes; None if they are not known.
        iterations: how many iterations were done when it was written; None if that is not known.
        start: a fingerprint of the weights that the run started from; None if it is not known.
    """

    config: Mapping[str, Any]
    images: int | None = None
    names: str | None = None
    classes: tuple[str, ...] | None = None
    iterations: int | None = None
    start: str | None = None

    @classmethod
    def of_run(
        cls,
        cfg: CfgNode,
        files: Sequence[str] | None,
        classes: Sequence[str] | None,
        start: str | None = None,
    ) -> "RunRecord":
        """The record of a run that is about to begin.

        Args:
            cfg: the run's config.
            files: the training images, in the order of the data set; None if they are not known.
            classes: the names of the classes that the run trains on; None if they are not known.
            start: the :func:`fingerprint` of the weights that the run starts from.
        """
        classes = None if classes is None else tuple(classes)
        if files is None:
            return cls(defining_keys(cfg), classes=classes, start=start)
        text = "\n".join(Path(file).name for file in files)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(defining_keys(cfg), len(files), digest, classes, start=start)

    @classmethod
    def of_checkpoint(cls, checkpoint: Mapping[str, Any]) -> "RunRecord | None":
        """The record in a checkpoint; None if the checkpoint holds weights alone."""
        state = checkpoint.get("run")
        if not isinstance(state, Mapping) or "config" not in state:
            return None
        iteration = checkpoint.get("iteration")
        return cls.of_state(state, None if iteration is None else iteration + 1)

    @classmethod
    def of_state(cls, state: Mapping[str, Any], iterations: int | None = None) -> "RunRecord":
        """The record that :meth:`state_dict` gave."""
        classes = state.get("classes")
        return cls(
            state["config"],
            state.get("images"),
            state.get("names"),
            None if classes is None else tuple(classes),
            iterations,
            state.get("start"),
        )

    @classmethod
    def of_note(cls, note: str) -> "RunRecord":
        """The record that :meth:`to_note` wrote."""
        return cls.of_state(json.loads(note))

    def to_note(self) -> str:
        """The record as text, for the notes of a Fisher estimate."""
        return json.dumps(self.state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Numbers, strings, lists and dicts, which torch.load reads with weights_only, and JSON."""
        state = {"config": dict(self.config), "images": self.images, "names": self.names}
        classes = None if self.classes is None else list(self.classes)
        return state | {"classes": classes, "start": self.start}

    def after(self, iterations: int) -> "RunRecord":
        """The same run after so many iterations."""
        return replace(self, iterations=iterations)

    def starting_from(self, start: str | None) -> "RunRecord":
        """The same run with another fingerprint of the weights that it started from."""
        return replace(self, start=start)

    def applied_to(self, cfg: CfgNode) -> CfgNode:
        """A config with the values that the run was trained with, where both have the key.

        Precision is left as in ``cfg``, for a model can be scored in another one.

        Args:
            cfg: stays as it is.
        """
        own = defining_keys(cfg)
        options = []
        for key, value in self.config.items():
            if key in own and not key.startswith(("SOLVER.AMP.", "SOLVER.MATMUL_PRECISION")):
                options += [key, value]
        applied = cfg.clone()
        applied.defrost()
        applied.merge_from_list(options)
        return applied

    def require_same_run(self, then: "RunRecord") -> None:
        """Refuses a checkpoint of another run than this one.

        Args:
            then: the record in the checkpoint.

        Raises:
            ValueError: names the differences, with both values.
        """
        troubles = as_words(differing_keys(then.config, self.config))
        troubles += [*then._other_data(self)]
        if troubles:
            raise ValueError("; ".join(troubles))

    def require_same_predictions(
        self, cfg: CfgNode, classes: Mapping[str, Sequence[str]] | None = None
    ) -> None:
        """Refuses a config with which the trained model would compute something else.

        Args:
            cfg: the config of an evaluation or a prediction.
            classes: the names of the classes of each data set that is scored.

        Raises:
            ValueError: names the differences, with both values, and the remedy.
        """
        differing = differing_keys(self.config, defining_keys(cfg), changes_predictions)
        troubles = as_words(differing)
        for name, own in (classes or {}).items():
            troubles += _other_classes(self.classes, own, name)
        if troubles:
            raise ValueError(
                f"the config does not fit the trained model: {'; '.join(troubles)}. Take the "
                "config.yaml that lies beside the checkpoint, or set these back"
            )

    def require_shareable(self, then: "RunRecord", keys: Keys, name: str) -> list[str]:
        """Refuses a warm-up or an estimate that this run would not have made itself.

        Args:
            then: the record of the run that made it.
            keys: :func:`changes_warmup` or :func:`changes_estimate`.
            name: the key and the file, for the message.

        Returns:
            Differences that are allowed but unusual, for a warning: the length of training, on
            which the schedule of learning rates depends, and the batch.

        Raises:
            ValueError: names the other differences, with both values, and the remedies.
        """
        differing = differing_keys(then.config, self.config, keys)
        unusual = {key: differing.pop(key) for key in _UNUSUAL if key in differing}
        troubles = [*as_words(differing), *then._other_data(self)]
        if None not in (then.start, self.start) and then.start != self.start:
            troubles.append(
                "it started from other weights than MODEL.VFM.WEIGHTS and MODEL.WEIGHTS give now"
            )
        if troubles:
            raise ValueError(
                f"{name} is of a run with other settings: {'; '.join(troubles)}. Set these back, "
                "or leave the key empty, so that this run makes its own"
            )
        return as_words(unusual)

    def _other_data(self, now: "RunRecord") -> Iterator[str]:
        """Says how the training data of a later run differ from this one's."""
        if self.images not in (None, now.images):
            yield f"there were {self.images} training images and are {now.images}"
        elif self.names not in (None, now.names):
            yield f"the {now.images} training images have other names, or another order"
        yield from _other_classes(self.classes, now.classes, "the training data")


def differing_keys(
    then: Mapping[str, Any], now: Mapping[str, Any], keys: Keys = lambda key: True
) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ, with the value then and now.

    Keys that only one of the two has, as after an update, are not compared.

    Args:
        then: values by key, as in a record.
        now: values by key of a later run.
        keys: says which keys count, for example :func:`changes_predictions`.
    """
    return {
        key: (value, now[key])
        for key, value in then.items()
        if keys(key) and key in now and not equal_values(value, now[key])
    }


def fingerprint(module: nn.Module) -> str:
    """Identifies a module's weights by some of each tensor's values, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def defining_keys(cfg: CfgNode) -> dict[str, Any]:
    """The values of all keys that define a run, by key with dots.

    Keys that nothing reads with this config are left out, and the options of other methods.
    """
    options = build_tuning_method(cfg).options
    return {
        key: value
        for key, value in _defining(cfg)
        if why_unread(key, cfg) is None and not _of_another_method(key, options)
    }


def _of_another_method(key: str, options: Sequence[str] | None) -> bool:
    parts = key.split(".")
    of_a_method = parts[0] == "TUNING" and len(parts) == 3
    return of_a_method and options is not None and parts[1] not in options


def _defining(node: CfgNode, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in node.items():
        key = prefix + name
        if isinstance(value, CfgNode):
            yield from _defining(value, f"{key}.")
        elif key not in _FREE and f"{key}.".startswith(tuple(f"{root}." for root in _DEFINING)):
            yield key, value


def as_words(differing: Mapping[str, tuple[Any, Any]]) -> list[str]:
    """Says of each key that :func:`differing_keys` found its value then and now."""
    return [f"{key} was {then!r} and is {now!r}" for key, (then, now) in differing.items()]


def _other_classes(
    then: Sequence[str] | None, now: Sequence[str] | None, name: str
) -> Iterator[str]:
    """Says where two lists of classes differ, unless one is not known."""
    if then is None or now is None:
        return
    if len(then) != len(now):
        yield f"{len(then)} classes were trained and {name} has {len(now)}"
        return
    for k, (before, after) in enumerate(zip(then, now, strict=True)):
        if not same_class(before, after):
            yield f"class {k} was {before!r} in training and is {after!r} in {name}"
            return
