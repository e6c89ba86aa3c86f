"""Runs a cell's command in a process of this machine, or in a SLURM job through submitit."""

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

from fishertune_d2.data.loader import count_cores


@dataclass(frozen=True)
class Attempt:
    """The exit code and the cost of a command.

    Attributes:
        exit_code: The exit code of the process; negative if a signal ended it.
        seconds: The wall time.
        peak_memory_gb: The largest resident set of the process or of one of its children, in 10^9
            bytes. It is at least the bench's own peak, from which Linux starts to count.
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
    """Runs a command, waits for its end, and appends its output to ``log``.

    Args:
        command: The command and its arguments.
        log: The file.
        variables: Environment variables to set, in addition to those of this process.
        running: A set that holds the process's id while it runs.

    Returns:
        The exit code and the cost.
    """
    running = set() if running is None else running
    start = time.monotonic()
    with open(log, "a") as out:
        process = subprocess.Popen(command, env={**os.environ, **variables}, stdout=out, stderr=out)
        running.add(process.pid)
        # Popen.wait() does not report the memory of the process.
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        running.discard(process.pid)
    unit = 1 if sys.platform == "darwin" else 1024
    return Attempt(process.returncode, time.monotonic() - start, usage.ru_maxrss * unit / 1e9)


class Local:
    """Runs processes on this machine. Each gets its part of the cores, and one of the GPUs.

    With more processes than GPUs, several share a GPU. A single process sees all GPUs.

    Args:
        jobs: The number of processes at a time.
    """

    def __init__(self, jobs: int):
        self.jobs = jobs
        self._running: set[int] = set()
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(jobs):
            self._slots.put(slot)
        self._gpus = _find_gpus()

    def run(self, command: Sequence[str], log: Path) -> Attempt:
        """Runs a command; see :func:`execute`."""
        slot = self._slots.get()
        try:
            variables = {"OMP_NUM_THREADS": str(max(1, count_cores() // self.jobs))}
            if self.jobs > 1 and self._gpus:
                variables["CUDA_VISIBLE_DEVICES"] = self._gpus[slot % len(self._gpus)]
            return execute(command, log, variables, self._running)
        finally:
            self._slots.put(slot)

    def stop(self) -> None:
        """Asks the processes to write a checkpoint and exit."""
        for process in list(self._running):
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(process, signal.SIGTERM)


def _find_gpus() -> list[str]:
    """Returns the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(i) for i in range(count)]
    return [name.strip() for name in names[:count]]


class Submitit:
    """Submits jobs to SLURM through submitit.

    Args:
        folder: The folder for submitit's own files, which all machines must see.
        parameters: Parameters of ``submitit.AutoExecutor``, such as ``slurm_partition=gpu``.

    Raises:
        ImportError: submitit is not installed.
        ValueError: A parameter is not written as ``name=value``.
    """

    jobs = 256  # each waiting job needs a thread; SLURM limits how many run

    def __init__(self, folder: Path, parameters: Sequence[str]):
        try:
            import submitit
        except ImportError as error:
            raise ImportError(
                "--submitit needs the package submitit, which is not installed: pip install "
                "submitit; or use --jobs"
            ) from error
        values: dict[str, int | str] = {}
        for parameter in parameters:
            name, sign, value = parameter.partition("=")
            if not sign:
                raise ValueError(f"--submitit {parameter!r}: write it as name=value")
            values[name] = int(value) if value.isdigit() else value
        self._executor = submitit.AutoExecutor(folder=folder)
        self._executor.update_parameters(**values)
        self._submitted: list = []

    def run(self, command: Sequence[str], log: Path) -> Attempt:
        """Runs a command in a job, and waits for its end; see :func:`execute`."""
        start = time.monotonic()
        job = self._executor.submit(execute, command, log, {})
        self._submitted.append(job)
        try:
            return job.result()
        except Exception as error:  # from submitit: the job was cancelled, or its machine failed
            with open(log, "a") as out:
                print(f"the job has no result: {error}", file=out)
            return Attempt(1, time.monotonic() - start, 0.0)

    def stop(self) -> None:
        """Cancels the jobs; their processes write a checkpoint and exit."""
        for job in list(self._submitted):
            job.cancel()
