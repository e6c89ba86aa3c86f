"""Where a cell's command runs: in a process here, or in a job of SLURM's through submitit."""

import os
import queue
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class Attempt:
    """How a command went.

    Attributes:
        exit_code: of the process; negative if a signal ended it.
        seconds: wall time.
        peak_memory_gb: the process's largest resident set, or that of a child of its own if that
            is larger, in 10^9 bytes. Linux starts to count from what this process, which only
            waits, has taken, so it is never below that.
    """

    exit_code: int
    seconds: float
    peak_memory_gb: float


def execute(
    command: Sequence[str],
    log: Path,
    variables: Mapping[str, str],
    running: set[int] | None = None,
) -> Attempt:
    """Runs a command to its end.

    Args:
        command: and its arguments.
        log: file that its output is added to.
        variables: of the environment, beside those of this process.
        running: holds the process's id meanwhile.
    """
    running = set() if running is None else running
    start = time.monotonic()
    with open(log, "a") as out:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=out, stderr=out)
        running.add(process.pid)
        # Popen.wait() would not say what the process used.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        running.discard(process.pid)
    unit = 1 if sys.platform == "darwin" else 1024
    return Attempt(process.returncode, time.monotonic() - start, usage.ru_maxrss * unit / 1e9)


class Local:
    """Processes on this machine, which share its cores and its GPUs evenly.

    Args:
        jobs: how many at a time.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self._running: set[int] = set()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        count = torch.cuda.device_count()
        self._gpus = visible.split(",") if visible and count else [str(i) for i in range(count)]

    def run(self, command: Sequence[str], log: Path) -> Attempt:
        """See :func:`execute`; waits for the end."""
        slot = self._slots.get()
        try:
            threads = max(1, (os.cpu_count() or 1) // self.jobs)
            variables = {"OMP_NUM_THREADS": str(threads)}
            if self.jobs > 1 and self._gpus:
                variables["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
            return execute(command, log, variables, self._running)
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """Asks the processes to write a checkpoint and leave."""
        for process in list(self._running):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGTERM)


class Submitit:
    """Jobs that submitit hands to SLURM.

    Args:
        folder: for submitit's own files; must be seen by all machines.
        parameters: of ``submitit.AutoExecutor``, as ``slurm_partition=gpu``.

    Raises:
        ImportError: if submitit is not installed.
        ValueError: if a parameter is no ``name=value``.
    """

    jobs = 256  # waiting for a job takes a thread; SLURM has limits of its own

    def __init__(self, folder: Path, parameters: Sequence[str]):
        try:
            import submitit
        except ImportError as error:
            raise ImportError(
                "--submitit needs the package submitit, which is not installed: pip install "
                "submitit; or use --jobs"
            ) from error
        pairs = [parameter.partition("=") for parameter in parameters]
        for (_, sign, _), parameter in zip(pairs, parameters, strict=True):
            if not sign:
                raise ValueError(f"--submitit {parameter!r}: write it as name=value")
        self._executor = submitit.AutoExecutor(folder=folder)
        self._executor.update_parameters(
            **{name: int(value) if value.isdigit() else value for name, _, value in pairs}
        )
        self._submitted: list = []

    def run(self, command: Sequence[str], log: Path) -> Attempt:
        """See :func:`execute`; waits for the end of the job."""
        start = time.monotonic()
        job = self._executor.submit(execute, command, log, {})
        self._submitted.append(job)
        try:
            return job.result()
        except Exception as error:  # submitit's: the job was cancelled, or its machine failed
            with open(log, "a") as out:
                print(f"the job has no result: {error}", file=out)
            return Attempt(1, time.monotonic() - start, 0.0)

    def stop(self) -> None:
        """Cancels the jobs: their processes write a checkpoint and leave."""
        for job in list(self._submitted):
            job.cancel()
