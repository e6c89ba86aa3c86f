"""Runs commands in forks of one process that has imported everything: imports take seconds."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]


def run_forked(
    program: str, arguments: Sequence[str], folder: Path, **variables: str
) -> subprocess.CompletedProcess:
    """Runs a command as Python would.

    Args:
        program: a module, as after ``python -m``, or a script of the checkout.
        arguments: the words after it.
        folder: the working folder.
        variables: added to the environment.

    Returns:
        Its exit code and its output, as of ``subprocess.run``.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fishertune_d2.train", "fishertune_d2.bench.__main__"])
    out, err = folder / "stdout.txt", folder / "stderr.txt"
    child = context.Process(
        target=_run, args=(program, list(arguments), folder, variables, out, err)
    )
    child.start()
    child.join()
    said = [file.read_text() for file in (out, err)]
    return subprocess.CompletedProcess([program, *arguments], child.exitcode, *said)


def _run(
    program: str, arguments: list[str], folder: Path, variables: dict, out: Path, err: Path
) -> None:
    for stream, file in ((sys.stdout, out), (sys.stderr, err)):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream.fileno())
    os.chdir(folder)
    os.environ.update(variables)
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own, between processes, outlives one that is killed
    sys.argv = [program, *arguments]
    if program.endswith(".py"):
        sys.path.insert(0, str((ROOT / program).parent))
        runpy.run_path(str(ROOT / program), run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
