"""Writes a checkpoint when a scheduler (SIGTERM) or Ctrl-C (SIGINT) asks a run to stop.

The run finishes its iteration, writes ``model_preempted.pth``, and exits with ``EXIT_CODE``, which
differs from 143 and 130, the codes of a process that a signal killed without a checkpoint. The
estimation and an evaluation stop at once with the same code; there the signal must reach every
process, as schedulers send it. An evaluation leaves a checkpoint, too, and the resumed run makes up
for it. In the estimation the last checkpoint stays as it was.

SLURM requeues the jobs that it preempts; a script recognises the others by the code:

    srun python train_net.py --config-file FILE --resume
    [ $? -eq 75 ] && scontrol requeue "$SLURM_JOB_ID"

For torchrun every code but 0 is a failure, on which it stops the other processes. So all of them
leave after the same iteration, and none before the checkpoint is complete.
"""

import logging
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import active_children
from types import FrameType
from typing import TypeVar

from detectron2.engine import HookBase
from detectron2.utils import comm

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
EXIT_CODE = os.EX_TEMPFAIL  # 75: "temporary failure, the user is invited to retry"


class Preemption(HookBase):
    """Leaves after the iteration in which a signal reached any of the processes.

    Register it after the hooks that belong to an iteration, the checkpointer's too, and before the
    evaluation's. Processes agree by one small all-gather in each iteration, on the CPU.

    Args:
        save: writes the checkpoint; called by every process.
    """

    def __init__(self, save: Callable[[], None]):
        self.save = save
        self._signal = 0
        self._at_once = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handles the signals in a ``with`` block, and restores the earlier handlers after it."""
        if threading.current_thread() is not threading.main_thread():
            yield  # Python allows handlers in the main thread only
            return
        with handling(self._receive):
            yield

    def at_once(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Wraps work that a signal stops at once, because no checkpoint can hold a part of it."""

        def interruptible() -> Result:
            self._at_once = True
            try:
                if self._signal:
                    sys.exit(EXIT_CODE)
                return work()
            except SystemExit:
                logger.warning("Stopped before its end; --resume goes on from the last checkpoint")
                raise
            finally:
                self._at_once = False

        return interruptible

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signal = number  # no logging here: the signal may have interrupted a logger
        if self._at_once:
            sys.exit(EXIT_CODE)

    def after_step(self) -> None:
        """Saves and leaves if a signal came."""
        self._signal = max(comm.all_gather(self._signal))
        if not self._signal:
            return
        self.save()
        comm.synchronize()
        logger.warning(
            "%s: a checkpoint was written after iteration %d, from which --resume goes on; leaving "
            "with exit code %d",
            signal.Signals(self._signal).name,
            self.trainer.iter,
            EXIT_CODE,
        )
        sys.exit(EXIT_CODE)


@contextmanager
def forwarding() -> Iterator[None]:
    """Passes the signals on to the child processes, for a process that only waits for them."""
    # Without it a scheduler's signal would end this process, and with it the job, at once.

    def forward(number: int, frame: FrameType | None) -> None:
        for child in active_children():
            if child.pid is not None:
                os.kill(child.pid, number)

    with handling(forward):
        yield


@contextmanager
def handling(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Lets ``handler`` receive SIGNALS in a ``with`` block; works in the main thread only."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)
