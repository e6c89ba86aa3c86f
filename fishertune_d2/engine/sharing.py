"""Starts a run from another run's warm-up or Fisher estimate, if its own would be the same."""

import logging

from detectron2.engine.train_loop import TrainerBase
from torch import nn

from fishertune_d2.fisher import FisherEstimate
from fishertune_d2.tuning import TuningMethod

from .checkpoint import WholeCheckpointer
from .run_record import NOTE, Keys, RunRecord, changes_estimate, changes_warmup
from .start_check import require_file

logger = logging.getLogger(__name__)


def load_warmup(
    file: str,
    *,
    model: nn.Module,
    method: TuningMethod,
    trainer: TrainerBase,
    record: RunRecord,
    iters: int,
) -> None:
    """Loads model and trainer from TUNING.WARMUP_CHECKPOINT.

    Args:
        file: a checkpoint from the end of another run's warm-up.
        model: the segmentor, without DDP wrapper.
        method: its tuning method.
        trainer: gets the iteration and the optimizer's state.
        record: of the run that starts.
        iters: TUNING.WARMUP_ITERS.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is not from the end of a warm-up of this length, was made with other
            settings, or does not fill the model.
    """
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
        _require_shareable(record, then, changes_warmup, name)

    checkpointer = WholeCheckpointer(
        model, method=method, accept=accept, complete=True, trainer=trainer
    )
    try:
        checkpointer.load(file)
        require_end(trainer.iter + 1)
    except ValueError as error:
        raise error if name in str(error) else ValueError(f"{name}: {error}") from error


def check_estimate(file: str, record: RunRecord) -> None:
    """Refuses a FISHER.ESTIMATE that this run would not have made, before anything is trained.

    Args:
        file: a fisher.safetensors of another run.
        record: of the run that starts.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or was made with other settings.
    """
    require_file("FISHER.ESTIMATE", file)
    note = FisherEstimate.load_notes(file).get(NOTE)
    if note is not None:
        then = RunRecord.of_note(note)
        _require_shareable(record, then, changes_estimate, f"FISHER.ESTIMATE {file}")


def _require_shareable(record: RunRecord, then: RunRecord, keys: Keys, name: str) -> None:
    unusual = record.require_shareable(then, keys, name)
    if unusual:
        logger.warning("%s was made in a run where %s", name, "; ".join(unusual))
