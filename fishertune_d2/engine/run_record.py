"""The record of a run, which decides with which later configs its results can be used.

A record travels with everything that a run leaves to other runs: its checkpoints, its warm-up
(TUNING.WARMUP_CHECKPOINT) and its Fisher estimate (FISHER.ESTIMATE).
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.config import changed
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.data.labels import same_class
from fishertune_d2.modeling.frozen import fixed_parts

from .run_keys import Result, as_words, defining_keys, differing_keys, results_of

# A warm-up that was made with other values of these keys works, but is not bit for bit the run's
# own (the schedule of learning rates depends on SOLVER.MAX_ITER).
_UNUSUAL = ("SOLVER.ACCUMULATE", "SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER")

# The name of the record among the notes of a Fisher estimate.
NOTE = "run"

# The attributes that are stored. A checkpoint has its iteration beside the record.
_STORED = ("config", "images", "names", "classes", "start", "unlabelled", "fixed", "texts")

# A fingerprint reads at least this many values of a tensor that has as many.
_SAMPLED = 64


@dataclass(frozen=True)
class RunRecord:
    """The settings and the data of a run.

    Attributes:
        config: the values of all keys that define the run, by key with dots.
        images: the number of training images; None if unknown.
        names: a digest of their names, without folders; None if unknown.
        classes: the names of the classes; None if unknown.
        iterations: how many iterations were done when it was written; None if unknown.
        start: a fingerprint of the weights that the run started from; None if unknown.
        unlabelled: a digest of the names of the images of self-training; None without them.
        fixed: a fingerprint of the parts that no stage trains, such as a text tower; None without.
        texts: the names of the classes that the head reads as text; None if it reads none.
    """

    config: Mapping[str, Any]
    images: int | None = None
    names: str | None = None
    classes: tuple[str, ...] | None = None
    iterations: int | None = None
    start: str | None = None
    unlabelled: str | None = None
    fixed: str | None = None
    texts: tuple[str, ...] | None = None

    @classmethod
    def of_run(
        cls,
        cfg: CfgNode,
        files: Sequence[str] | None,
        classes: tuple[str, ...] | None,
        start: str | None = None,
        unlabelled: Sequence[str] = (),
        model: nn.Module | None = None,
    ) -> "RunRecord":
        """Records a run that begins with these training images, classes, weights and model."""
        images, names = (None, None) if files is None else (len(files), _digest(files))
        others = _digest(unlabelled) if unlabelled else None
        record = cls(defining_keys(cfg), images, names, classes, start=start, unlabelled=others)
        if model is None:
            return record
        parts = fixed_parts(model)
        fixed = fingerprint(nn.ModuleList(parts)) if parts else None
        return replace(record, fixed=fixed, texts=texts_of(model))

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
        """The record that :meth:`state_dict` gave; older records lack some of its entries."""
        known: dict[str, Any] = {key: state.get(key) for key in _STORED}
        for key in ("classes", "texts"):  # JSON makes lists of tuples
            if known[key] is not None:
                known[key] = tuple(known[key])
        return cls(**known, iterations=iterations)

    def state_dict(self) -> dict[str, Any]:
        """The record for JSON, and for a checkpoint that torch.load reads with weights_only."""
        return {key: getattr(self, key) for key in _STORED}

    def applied_to(self, cfg: CfgNode) -> CfgNode:
        """A copy of a config with the values that the run was trained with, except precision."""
        # Not defining_keys(cfg): which keys are read depends on the values of the run.
        known = dict(dotted_items(cfg))
        options = []
        for key, value in self.config.items():
            if key not in known or results_of(key) is None:  # of another version of this package
                continue
            # A model can be scored in another precision.
            if not key.startswith(("SOLVER.AMP.", "SOLVER.MATMUL_PRECISION")):
                options += [key, value]
        return changed(cfg, options)

    def require_same_run(self, then: "RunRecord") -> None:
        """Refuses the record of a checkpoint, ``then``, if it is of another run than this one."""
        troubles = [*as_words(differing_keys(then.config, self.config)), *then._other_data(self)]
        if then.unlabelled != self.unlabelled:
            troubles.append("the images of SELF_TRAINING.IMAGES are others, or there were none")
        troubles += then._other_fixed(self)
        if troubles:
            raise ValueError("; ".join(troubles))

    def require_same_predictions(
        self,
        cfg: CfgNode,
        classes: Mapping[str, Sequence[str]] | None = None,
        texts: Sequence[str] | None = None,
    ) -> None:
        """Refuses a config, or classes of scored data sets, that the trained model does not fit.

        Args:
            cfg: of the model that the weights are loaded into.
            classes: of each scored data set.
            texts: the names that this model's head reads as text.

        Raises:
            ValueError: names the differences and the remedy.
        """
        differing = differing_keys(self.config, defining_keys(cfg), Result.PREDICTIONS)
        troubles = as_words(differing)
        for name, own in (classes or {}).items():
            troubles += _other_classes(self.classes, own, name)
        troubles += other_texts(self.texts, texts)
        if troubles:
            raise ValueError(
                f"the config does not fit the trained model: {'; '.join(troubles)}. Take the "
                "config.yaml that lies beside the checkpoint, or set these back"
            )

    def require_shareable(self, then: "RunRecord", result: Result, name: str) -> list[str]:
        """Refuses a warm-up or an estimate that this run would not have made itself.

        Args:
            then: the record of the run that made it.
            result: ``Result.WARMUP`` or ``Result.ESTIMATE``.
            name: the key and the file, for the message.

        Returns:
            Allowed but unusual differences, for a warning.

        Raises:
            ValueError: names the other differences, with both values, and the remedies.
        """
        differing = differing_keys(then.config, self.config, result)
        unusual = {key: differing.pop(key) for key in _UNUSUAL if key in differing}
        troubles = [*as_words(differing), *then._other_data(self)]
        if None not in (then.start, self.start) and then.start != self.start:
            troubles.append(
                "it started from other weights than MODEL.VFM.WEIGHTS gives now, or from "
                "MODEL.WEIGHTS (such a warm-up cannot be shared: to start from its end, name it in "
                "MODEL.WEIGHTS, with TUNING.WARMUP_ITERS 0)"
                if result is Result.WARMUP
                else "it started from other weights than MODEL.VFM.WEIGHTS and MODEL.WEIGHTS give "
                "now"
            )
        troubles += then._other_fixed(self)
        if troubles:
            raise ValueError(
                f"{name} is of a run with other settings: {'; '.join(troubles)}. Set these back, "
                "or leave the key empty, so that this run makes its own"
            )
        return as_words(unusual)

    def _other_fixed(self, now: "RunRecord") -> Iterator[str]:
        """Yields how the parts that no stage trains, and the names of classes, differ."""
        if None not in (self.fixed, now.fixed) and self.fixed != now.fixed:
            yield (
                "the text tower, or the public copy of the backbone, had other weights than "
                "MODEL.TEXT.WEIGHTS and MODEL.VFM.WEIGHTS give now"
            )
        yield from other_texts(self.texts, now.texts)

    def _other_data(self, now: "RunRecord") -> Iterator[str]:
        """Yields how the training data of a later run differ from this one's."""
        if self.images not in (None, now.images):
            yield f"there were {self.images} training images and are {now.images}"
        elif self.names not in (None, now.names):
            yield f"the {now.images} training images have other names, or another order"
        yield from _other_classes(self.classes, now.classes, "the training data")


def remember_run(model: nn.Module, record: RunRecord | None) -> None:
    """Lets a model remember the run that trained it, as its attribute ``trained_by``."""
    model.trained_by = record  # type: ignore[assignment]  # torch types attributes as tensors


def run_of(model: nn.Module) -> RunRecord | None:
    """The record of the run that trained a model; None if that run is unknown."""
    record = getattr(model, "trained_by", None)
    return record if isinstance(record, RunRecord) else None


def fingerprint(module: nn.Module) -> str:
    """Identifies a module's weights by some of each tensor's values, the same on every device."""
    digest = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        flat = tensor.detach().flatten()
        values = flat[:: max(1, flat.numel() // _SAMPLED)].to("cpu", torch.float32)
        digest.update(f"{name}{tuple(tensor.shape)}".encode() + values.numpy().tobytes())
    return digest.hexdigest()


def _digest(files: Sequence[str]) -> str:
    """Identifies files by their names in order, without folders."""
    return hashlib.sha256("\n".join(Path(file).name for file in files).encode()).hexdigest()


def texts_of(model: nn.Module) -> tuple[str, ...] | None:
    """The names of the classes that a model's head reads as text; None if it reads none."""
    return getattr(getattr(model, "sem_seg_head", None), "class_texts", None) or None


def other_texts(then: Sequence[str] | None, now: Sequence[str] | None) -> Iterator[str]:
    """Yields the first difference between the names that a head read and reads; None fits all."""
    for before, after in zip(then or (), now or (), strict=False):
        if before != after:
            yield (
                f"the head read the class {before!r} and reads {after!r} (MODEL.TEXT.CLASSES, or "
                "the names of the first data set in DATASETS.TRAIN)"
            )
            return


def _other_classes(
    then: Sequence[str] | None, now: Sequence[str] | None, name: str
) -> Iterator[str]:
    """Yields the first difference between two lists of classes, if both are known."""
    if then is None or now is None:
        return
    if len(then) != len(now):
        yield f"{len(then)} classes were trained and {name} has {len(now)}"
        return
    for k, (before, after) in enumerate(zip(then, now, strict=True)):
        if not same_class(before, after):
            yield f"class {k} was {before!r} in training and is {after!r} in {name}"
            return
