"""Trains and scores cells: finished cells are skipped, interrupted cells are resumed."""

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import detectron2

from fishertune_d2.engine.preemption import EXIT_CODE, handling
from fishertune_d2.engine.run_keys import as_words, differing_keys
from fishertune_d2.files import whole_file
from fishertune_d2.version import commit

from .cells import Cell, makers, recipe_of
from .launch import Attempt, Local, Submitit

DONE, FAILED, STOPPED = "done", "failed", "stopped"
# Seconds between two looks for shared files that running cells have made.
_LOOK_EVERY = 1.0


class Runner:
    """Runs cells in their order, each as soon as the shared files that it takes are made.

    A cell makes its warm-up and its estimate long before its end, so others can start meanwhile.

    Args:
        launcher: Runs the commands.
        command: The command that trains, without arguments.
    """

    def __init__(self, launcher: Local | Submitit, command: Sequence[str]):
        self.launcher = launcher
        self.command = list(command)
        self._stopping = False
        self._linking = threading.Lock()

    def run(self, cells: Sequence[Cell], sets: Sequence[str], name: str) -> bool:
        """Trains the cells that are not trained, and scores those that are not scored.

        A signal to this process or to a training ends in a SystemExit with the exit code of
        preemption. The same command then resumes the cells.

        Args:
            cells: All cells that share files with each other.
            sets: The data sets to score on.
            name: The folder, below the cell's own, for scores that are made after training.

        Returns:
            Whether all cells are finished.
        """
        ends: list[str] = []
        saying = threading.Lock()

        def one(cell: Cell) -> None:
            before, start = cell.results(sets, name) is not None, time.monotonic()
            end = STOPPED if self._stopping else self._run(cell, sets, name)
            with saying:  # else two cells that end together share a number and a line
                ends.append(end)
                if end == DONE:
                    end = "done before" if before else f"done in {time.monotonic() - start:.0f} s"
                if not self._stopping or end != STOPPED:
                    _say(f"[{len(ends)}/{len(cells)}] {cell.folder}: {end}")

        after = makers(cells)
        with self._listening(), ThreadPoolExecutor(self.launcher.jobs) as pool:
            waiting, over = list(cells), set[Path]()
            running: dict[Future, Cell] = {}
            while waiting or running:
                for cell in running.values():
                    self._share_early(cell)
                free = [c for c in waiting if _has_shared(c) or after[c.folder] <= over]
                for cell in free[: self.launcher.jobs - len(running)]:
                    waiting.remove(cell)
                    running[pool.submit(one, cell)] = cell
                for future in wait(running, _LOOK_EVERY, return_when=FIRST_COMPLETED).done:
                    future.result()
                    over.add(running.pop(future).folder)
        if STOPPED in ends:
            _say("stopped early: run the same command to resume")
            sys.exit(EXIT_CODE)
        return all(end == DONE for end in ends)

    def _run(self, cell: Cell, sets: Sequence[str], name: str) -> str:
        """Returns DONE, STOPPED, or the reason for the failure."""
        if cell.results(sets, name) is None:
            if cell.weights.is_file():
                folder = cell.scored_in(name)
                end = self._attempt(cell, cell.score_arguments(sets, folder), folder)
            else:
                end = self._train(cell, sets)
            if end != DONE:
                return end
        for checkpoint in (
            *cell.folder.glob("model_[0-9]*.pth"),
            *cell.folder.glob("model_preempted.pth"),
        ):
            checkpoint.unlink()  # large, and no longer needed
        with self._linking:
            return self._share(cell)

    def _train(self, cell: Cell, sets: Sequence[str]) -> str:
        for what, path in cell.takes.items():
            if not path.is_file():
                return f"{FAILED}: the {what.words} that it takes is missing, {path}"
        return self._attempt(cell, cell.arguments(sets), cell.folder)

    def _attempt(self, cell: Cell, arguments: Sequence[str], folder: Path) -> str:
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "stdout.txt"
        attempt = self.launcher.run([*self.command, *arguments], log)
        _record(cell, [*self.command, *arguments], attempt, folder)
        if self._stopping or attempt.exit_code == EXIT_CODE:
            return STOPPED
        if attempt.exit_code or not (folder / "results.json").is_file():
            return f"{FAILED} with exit code {attempt.exit_code}: see {log}"
        return DONE

    def _share_early(self, cell: Cell) -> None:
        """Links what a running cell has made, since it is written whole and stays as it is."""
        with self._linking:
            for what in cell.makes:
                file, path = cell.folder / what.file, cell.shared[what]
                if file.is_file() and not path.is_file():
                    _link(file, path)

    def _share(self, cell: Cell) -> str:
        """Links the cell's files and the shared files, so that each takes its disk space once."""
        for what, path in cell.shared.items():
            file = cell.folder / what.file
            if what in cell.makes:
                if not file.is_file():
                    return f"{FAILED}: it left no {what.words}, {file}; delete its folder"
                _link(file, path)
            elif file.is_file() and path.is_file() and not file.samefile(path):
                _link(path, file)
        return DONE

    @contextmanager
    def _listening(self) -> Iterator[None]:
        """Passes signals on to the running cells, which write a checkpoint and exit."""

        def stop(number: int, frame: object) -> None:
            self._stopping = True
            self.launcher.stop()

        if threading.current_thread() is not threading.main_thread():
            yield  # Python lets no other thread have handlers
            return
        with handling(stop):
            yield


def _has_shared(cell: Cell) -> bool:
    """Whether all shared files that a cell takes are there."""
    return all(path.is_file() for path in cell.takes.values())


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _link(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(target) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(source, temporary)
        except OSError:  # a file system without links
            shutil.copyfile(source, temporary)


def _record(cell: Cell, command: Sequence[str], attempt: Attempt, folder: Path) -> None:
    """Writes ``cell.json``: the config, the command, and the cost of each attempt."""
    path = folder / "cell.json"
    earlier = json.loads(path.read_text())["attempts"] if path.is_file() else []
    attempts = [*earlier, {**asdict(attempt), "commit": commit()}]
    text = {
        "entry": cell.entry.name,
        "vfm": cell.vfm,
        "seed": cell.seed,
        "rate": cell.rate,
        "config": cell.config,
        "command": list(command),
        "recipe": cell.recipe,
        "versions": _versions(),
        "seconds": sum(a["seconds"] for a in attempts),
        "peak_memory_gb": max(a["peak_memory_gb"] for a in attempts),
        "peak_gpu_memory_mb": _gpu_memory(folder / "log.txt"),
        "attempts": attempts,
    }
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(text, indent=2) + "\n")


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"detectron2": detectron2.__version__}
    for name in ("torch", "timm", "transformers", "fishertune-d2"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:  # a checkout that is not installed; the record has its commit
            versions[name] = None
    return versions


def _gpu_memory(log: Path) -> int | None:
    """Returns the peak of torch's GPU memory in MiB; Detectron2 logs it if there is a GPU."""
    found = re.findall(r"max_mem: (\d+)M", log.read_text()) if log.is_file() else []
    return max(map(int, found), default=None)


def require_same_recipe(cells: Sequence[Cell]) -> None:
    """Refuses cells whose folders hold a run of another recipe, before any cell starts.

    Raises:
        ValueError: The recipes differ; the message names folders, keys, and both values.
    """
    troubles = []
    for cell in cells:
        differing = differing_keys(recipe_of(cell.folder), cell.recipe)
        troubles += [f"  {cell.folder}: {words}" for words in as_words(differing)]
    if troubles:
        raise ValueError(
            "cells were run with another recipe; restore it, or name another --output:\n"
            + "\n".join(troubles)
        )
