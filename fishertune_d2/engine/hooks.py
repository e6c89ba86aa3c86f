"""The three stages as hooks: warm-up, estimation, tuning.

A trainer registers ``FisherEstimation``, ``WarmupFreeze`` and ``ParameterMask`` in this order. At
the first iteration after warm-up, the first ranks the weights, the second starts the tuning stage,
and the third lets more and more of the ranked weights move.
"""

import hashlib
import logging
from collections.abc import Callable, Mapping
from math import cos, pi
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from torch import Tensor

from fishertune_d2.config import require_choice
from fishertune_d2.fisher import (
    ALLOCATIONS,
    STEPS,
    FisherEstimate,
    Selection,
    Units,
    overlap,
    relative_change,
    steps_of_units,
    tuned_share,
)
from fishertune_d2.tuning import MaskedUpdate, SelectedWeights

from .optimizer import is_backbone
from .run_record import NOTE

logger = logging.getLogger(__name__)


class LearningRates(HookBase):
    """Steps the trainer's scheduler and writes the learning rates of backbone and head.

    It replaces Detectron2's LRScheduler hook, which keeps its first optimizer; here each stage
    builds a new one.
    """

    def __init__(self):
        self._optimizer: torch.optim.Optimizer | None = None
        self._scalars: list[str] = []  # the name that each parameter group is logged under

    def after_step(self) -> None:
        """Writes ``lr`` (the head's) and ``lr_backbone``, then sets the next iteration's rates."""
        optimizer = self.trainer.optimizer
        if optimizer is not self._optimizer:
            names = {p: name for name, p in self.trainer.model.named_parameters()}
            firsts = [names[group["params"][0]] for group in optimizer.param_groups]
            backbone = [is_backbone(name.removeprefix("module.")) for name in firsts]
            self._scalars = ["lr_backbone" if each else "lr" for each in backbone]
            self._optimizer = optimizer
        scalars: dict[str, float] = {}
        for name, group in zip(self._scalars, optimizer.param_groups, strict=True):
            # A part's first group is that of its weights; its biases may have another rate.
            scalars.setdefault(name, group["lr"])
        self.trainer.storage.put_scalars(**scalars, smoothing_hint=False)
        self.trainer.scheduler.step()


class WeightDecay(HookBase):
    """Lowers the weight decay by half a cosine over the tuning stage, as SoMA (CVPR 2025) does.

    Each parameter group keeps its part: one that starts at 0 stays there. The decay is a function
    of the iteration, and the groups remember where they started, so a resumed run goes on exactly.

    Args:
        start: the first iteration of the tuning stage, T1.
        iters: its length, T3.
        end: the decay at its end, as a share of that at its start.
    """

    def __init__(self, start: int, iters: int, end: float):
        self.start = start
        self.iters = iters
        self.end = end

    def before_step(self) -> None:
        """Sets the decay of this iteration."""
        step = self.trainer.iter - self.start
        if step < 0:
            return
        share = self.end + (1 - self.end) * (1 + cos(pi * step / self.iters)) / 2
        for group in self.trainer.optimizer.param_groups:
            start = group.setdefault("initial_weight_decay", group["weight_decay"])
            group["weight_decay"] = share * start


class WarmupFreeze(HookBase):
    """Keeps the backbone frozen for the first T1 iterations (Algorithm 1, step 1).

    During warm-up no parameter of the backbone requires a gradient, so no graph of it is kept and
    no backward pass through it is paid. The trainer must offer ``start_stage("warmup" |
    "tuning")``, which builds parameters, optimizer and DDP wrapper for that stage: flags flipped
    under a live optimizer train nothing, and under a live DDP wrapper replicas diverge.

    Args:
        iters: T1; 0 skips the warm-up.
        on_end: called after the last warm-up iteration, for example to save a checkpoint.
    """

    def __init__(self, iters: int, on_end: Callable[[], None] | None = None):
        self.iters = iters
        self.on_end = on_end

    def before_step(self) -> None:
        """Starts the tuning stage when warm-up is over."""
        if self.trainer.iter == self.iters:
            self.trainer.start_stage("tuning")

    def after_step(self) -> None:
        """Calls ``on_end`` after the last warm-up iteration."""
        if self.trainer.iter == self.iters - 1 and self.on_end is not None:
            self.on_end()


class FisherEstimation(HookBase):
    """Ranks the backbone's units once, at one iteration (Algorithm 1, step 2).

    It writes ``fisher.safetensors`` (F(x) and F(x'), if the method needs them) and
    ``selection.safetensors`` (the ranked units) into ``output_dir``. All processes measure; the
    first one ranks and writes, and the others read its file. A run that resumes after this
    iteration reads the selection back, and refuses any but the one it was trained with. An
    interrupted estimation starts again from its beginning.

    Args:
        estimate: measures F(x) and F(x') on the trainer's model, or returns None if the method
            needs neither; see :func:`fishertune_d2.fisher.estimate_fisher`.
        scores: turns the result of ``estimate`` into one score for each unit.
        start: the iteration before which to estimate, T1.
        share: the largest share that will be tuned, d_max.
        base: the number of parameters that the share refers to: all of the backbone's.
        output_dir: the folder of the files; every process must be able to read them.
        eps: guard of dF (Eq. 5) in the log's comparison with dF alone.
        units: what the scores are of; by default of single weights, by parameter name.
        allocation: see :meth:`Selection.from_scores`.
        steps: ``"equal"``, or ``"fisher"`` to scale the steps of units, see
            :func:`fishertune_d2.fisher.steps_of_units`.

    Attributes:
        selection: the selected units, after the estimation.
    """

    def __init__(
        self,
        estimate: Callable[[], FisherEstimate | None],
        scores: Callable[[FisherEstimate | None], Mapping[str, Tensor]],
        *,
        start: int,
        share: float,
        base: int,
        output_dir: str | Path,
        eps: float = 1e-8,
        units: Units | None = None,
        allocation: str = "global",
        steps: str = "equal",
    ):
        require_choice("allocation", allocation, ALLOCATIONS)
        require_choice("steps", steps, STEPS)
        self.estimate = estimate
        self.scores = scores
        self.start = start
        self.share = share
        self.base = base
        self.eps = eps
        self.units = units
        self.allocation = allocation
        self.steps = steps
        self.selection: Selection | None = None
        self.selection_file = Path(output_dir) / "selection.safetensors"
        self.estimate_file = Path(output_dir) / "fisher.safetensors"
        self._digests: dict[str, str] = {}

    def before_step(self) -> None:
        """Estimates and selects, at ``start``."""
        if self.trainer.iter != self.start:
            return
        estimate = self.estimate()
        if comm.is_main_process():
            self._select(estimate)
        comm.synchronize()
        # Only one process ranks: a single different bit of F would change the lengths of the
        # trained vectors, which DDP needs to be the same everywhere.
        self.selection = Selection.load(self.selection_file)
        self._digests = {"selection": _digest(self.selection_file)}

    def state_dict(self) -> dict:
        """The hash of the selection, so that a resumed run knows its own."""
        return self._digests

    def load_state_dict(self, state: dict) -> None:
        """Reads the selection that the checkpoint was trained with, and refuses another one."""
        if not self.selection_file.is_file():
            raise FileNotFoundError(
                f"the checkpoint was trained with {self.selection_file}, which is gone: put it "
                "back, or resume from a checkpoint of the warm-up stage"
            )
        if _digest(self.selection_file) != state["selection"]:
            raise ValueError(
                f"{self.selection_file} is not the selection the checkpoint was trained with: put "
                "that one back, or resume from a checkpoint of the warm-up stage"
            )
        self._digests = state
        self.selection = found = Selection.load(self.selection_file)
        unit = self.units.unit if self.units else "weight"
        allocation = found.notes.get("allocation", "global")
        steps = "equal" if found.steps is None else "fisher"
        self._require_same("unit", found.unit, unit)
        self._require_same("allocation", allocation, self.allocation)
        self._require_same("steps", steps, self.steps)

    def _require_same(self, what: str, then: str, now: str) -> None:
        """Refuses another choice than the checkpoint's, which records of old runs do not name."""
        if then != now:
            raise ValueError(
                f"the checkpoint in {self.selection_file.parent} was trained with the {what} "
                f"{then!r}, and this run asks for {now!r}: set TUNING.{what.upper()}, or the "
                f"argument {what}=, back to {then!r}, or start a new run in another folder"
            )

    def _select(self, estimate: FisherEstimate | None) -> None:
        """Ranks the units, and writes both files."""
        selection = self._ranked(self.scores(estimate))
        if estimate is not None:
            notes = {key: text for key, text in estimate.notes.items() if key != NOTE}
            selection.notes |= notes | {"images": str(estimate.images)}
            if self.steps == "fisher":
                selection.steps = steps_of_units(estimate.f, selection)
            self._log(estimate, selection)
            estimate.save(self.estimate_file)
        selection.save(self.selection_file)

    def _ranked(self, scores: Mapping[str, Tensor]) -> Selection:
        return Selection.from_scores(scores, self.share, self.base, self.units, self.allocation)

    def _log(self, estimate: FisherEstimate, selection: Selection) -> None:
        means = estimate.by_unit(selection.units)
        by_f = self._overlap(selection, means.f)
        by_change = self._overlap(selection, relative_change(means.f, means.shifted, self.eps))
        self.trainer.storage.put_scalars(
            **{"fisher/overlap_F": by_f, "fisher/overlap_dF": by_change}, smoothing_hint=False
        )
        logger.info(
            "Fisher information from %d images, mean shift weight %.3f. Of the selection, %.1f %% "
            "would be selected by F alone and %.1f %% by dF alone",
            estimate.images,
            estimate.shift_weight,
            100 * by_f,
            100 * by_change,
        )

    def _overlap(self, selection: Selection, scores: Mapping[str, Tensor]) -> float:
        """The part of the selection that these scores would select as well."""
        if not any(bool(score.any()) for score in scores.values()):
            return 0.0  # dF without a shift
        return overlap(selection, self._ranked(scores))


class ParameterMask(HookBase):
    """Lets only the selected weights move, more and more of them (Algorithm 1, step 3; Eq. 16).

    Args:
        update: called at the first iteration of the tuning stage; returns the object that
            restricts the update: ``SelectedWeights``, or, for an optimizer that already holds the
            dense tensors, ``MaskedUpdate``.
        start: the first iteration of the tuning stage, T1.
        iters: its length, T3.
        d_min: the share tuned at the first iteration.
        d_max: the share tuned at the last.
        schedule: see :func:`fishertune_d2.fisher.tuned_share`.
    """

    def __init__(
        self,
        update: Callable[[], SelectedWeights | MaskedUpdate],
        *,
        start: int,
        iters: int,
        d_min: float,
        d_max: float,
        schedule: str = "growing",
    ):
        self.update = update
        self.start = start
        self.iters = iters
        self.d_min = d_min
        self.d_max = d_max
        self.schedule = schedule
        self._update: SelectedWeights | MaskedUpdate | None = None

    def before_step(self) -> None:
        """Selects the weights that this iteration may move."""
        step = self.trainer.iter - self.start
        if step < 0:
            return
        progress = min(1.0, step / max(1, self.iters - 1))
        share = tuned_share(progress, self.d_min, self.d_max, schedule=self.schedule)
        if self._update is None:
            self._update = self.update()
            _log_tuned(self._update.selection, share)
        tuned = self._update.grow(share)
        self.trainer.storage.put_scalars(
            **{"fisher/tuned_share": share, "fisher/tuned_parameters": tuned}, smoothing_hint=False
        )

    def after_train(self) -> None:
        """Logs the weights that are tuned in the end, and removes the restriction."""
        if self._update is not None and self.trainer.iter >= self.start + self.iters:
            _log_tuned(self._update.selection, None)
            self._update.release()


def _log_tuned(selection: Selection, share: float | None) -> None:
    total = sum(selection.summary(share).values())
    logger.info(
        "Tuned: %s of %s backbone weights (%.2f %%), by kind and block:\n%s",
        f"{total:,}",
        f"{selection.base:,}",
        100 * total / selection.base,
        selection.table(share, by_block=True),
    )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
