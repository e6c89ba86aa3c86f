"""Decides what a run may take over: its own checkpoint, another run's warm-up or estimate."""

import json
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from detectron2.engine.train_loop import TrainerBase
from torch import nn

from fishertune_d2.fisher import ESTIMATORS, FisherEstimate
from fishertune_d2.tuning import TuningMethod

from .checkpoint import WholeCheckpointer
from .run_keys import Result
from .run_record import NOTE, RunRecord
from .start_check import require_file

logger = logging.getLogger(__name__)


class OwnRun:
    """Puts a run's record into its checkpoints, and refuses to resume from another run's.

    Args:
        record: the record of the run.
        output_dir: the folder of its checkpoints, for the message.
    """

    def __init__(self, record: RunRecord, output_dir: str):
        self.record = record
        self.output_dir = output_dir

    def state_dict(self) -> dict:
        """The record's, for a checkpoint."""
        return self.record.state_dict()

    def load_state_dict(self, state: Mapping) -> None:
        """Refuses a checkpoint's record of another run, and names the way to train for longer."""
        then = RunRecord.of_state(state)
        try:
            self.record.require_same_run(then)
        except ValueError as error:
            raise ValueError(
                f"the checkpoint in {self.output_dir} is of another run: {error}. Put that back as "
                f"it was to go on, or start a new run in another OUTPUT_DIR{self._shortcut(then)}"
            ) from None
        self.record = replace(self.record, start=then.start)

    def _shortcut(self, then: RunRecord) -> str:
        """Names the warm-up and the estimate that a new run can take over, if there are any."""
        options = []
        for key, name, result in (
            ("TUNING.WARMUP_CHECKPOINT", "model_warmup.pth", Result.WARMUP),
            ("FISHER.ESTIMATE", "fisher.safetensors", Result.ESTIMATE),
        ):
            file = Path(self.output_dir, name)
            with suppress(ValueError):  # of other settings
                self.record.require_shareable(then, result, key)
                options += [f"{key} {file}"] if file.is_file() else []
        return f", which can start from this one's warm-up: {' '.join(options)}" if options else ""


def load_warmup(
    file: str,
    *,
    model: nn.Module,
    method: TuningMethod,
    trainer: TrainerBase,
    record: RunRecord,
    iters: int,
) -> None:
    """Loads the end of another run's warm-up; refuses one of other settings or another length."""
    name = f"TUNING.WARMUP_CHECKPOINT {file}"
    require_file("TUNING.WARMUP_CHECKPOINT", file)

    def require_end(iterations: int | None) -> None:
        if iterations not in (None, iters):
            raise ValueError(
                f"{name} was written after {iterations} iterations, but TUNING.WARMUP_ITERS is "
                f"{iters}: make them equal"
            )

    def accept(then: RunRecord) -> None:
        require_end(then.iterations)
        _require_shareable(record, then, Result.WARMUP, name)

    checkpointer = WholeCheckpointer(model, method=method, accept=accept, complete=True)
    try:
        state = checkpointer.load(file)
        if "trainer" not in state:
            raise ValueError(
                "it holds weights alone, and no state of a training: name a checkpoint that a run "
                "wrote, or start from the weights by MODEL.WEIGHTS"
            )
        trainer.load_state_dict(state["trainer"])
        require_end(trainer.iter + 1)
    except ValueError as error:
        if name in str(error):
            raise
        raise ValueError(f"{name}: {error}") from error


def check_estimate(file: str, record: RunRecord) -> None:
    """Refuses, before anything trains, a FISHER.ESTIMATE that this run would not have made."""
    require_file("FISHER.ESTIMATE", file)
    notes = FisherEstimate.load_notes(file)
    if NOTE in notes:
        then = RunRecord.of_state(json.loads(notes[NOTE]))
        _require_shareable(record, then, Result.ESTIMATE, f"FISHER.ESTIMATE {file}")
    estimator = ESTIMATORS.get(notes.get("estimator", ""))
    version = int(notes.get("version", 1))
    if estimator is not None and version != estimator.version:
        logger.warning(
            "FISHER.ESTIMATE %s was measured by version %d of the estimator %r, which gives "
            "another F than today's version %d; leave the key empty to measure again",
            *(file, version, notes["estimator"], estimator.version),
        )


def _require_shareable(record: RunRecord, then: RunRecord, result: Result, name: str) -> None:
    unusual = record.require_shareable(then, result, name)
    if unusual:
        logger.warning("%s was made in a run where %s", name, "; ".join(unusual))
