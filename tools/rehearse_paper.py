#!/usr/bin/env python
"""Rehearses the paper's experiments without a GPU and without the data: tools/rehearse_paper.py.

    python tools/rehearse_paper.py            # every step; 7 minutes on two idle cores
    python tools/rehearse_paper.py --short    # one process, one cell; one minute on an idle core

Run it before days of GPU time. It writes a few fake images in the layouts and sizes of GTAV,
Cityscapes, BDD100K and Mapillary, and then runs the commands of a real experiment with the real
configs: a training by 8 processes that is killed and resumed, evaluations, Table 1, an export and a
report. Only the model is small, and the steps are few (SMALL below lists these keys).

Prints a line for each step, PASS or FAIL with seconds. A step that fails does not stop the next,
but steps that need its files fail too. The exit status is 1 if a step failed. The folder --output
keeps the output of each step, STEP.txt, and all files of the last rehearsal.
"""

import argparse
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.data.dataset_table import DATASETS  # noqa: E402 - need not be installed
from fishertune_d2.data.labels import LABEL_MAPS  # noqa: E402

TRAIN, TEST = "gtav_train", ("cityscapes_val", "bdd100k_val", "mapillary_val")
# Images of the training set, and of each test set.
TRAINED, TESTED = 8, 2
# Mapillary's sizes vary; this one is frequent.
VARYING = (4032, 3024)
# The keys that differ from the real experiment, beside MODEL.VFM.WEIGHTS and OUTPUT_DIR.
SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VFM.NAME": "tiny",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 3,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 20,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 256,
    "SOLVER.MAX_ITER": 5,
    "SOLVER.EMA_START": 3,
    "SOLVER.CHECKPOINT_PERIOD": 1,
    "TUNING.WARMUP_ITERS": 2,
    "FISHER.BATCHES": 2,  # but at least one for each process
    "TEST.PICTURES": 1,
}
# The training is killed after this iteration, the first of the tuning stage.
KILLED_AFTER = SMALL["TUNING.WARMUP_ITERS"]
# Seconds after which a command counts as stuck. A table has 22 cells; other programs may run, too.
PATIENCE = 1800


class StepFailed(Exception):
    """A step whose command failed, or left something other than expected; the message says so."""


@dataclass
class Rehearsal:
    """The folder of a rehearsal, and how it is shortened.

    Attributes:
        folder: For everything that the steps write.
        short: Whether one process trains, with a batch for one GPU, and Table 1 has one cell.
        step: The name of the step that runs, for its log.
    """

    folder: Path
    short: bool
    step: str = ""

    @property
    def config(self) -> str:
        """The config that is trained."""
        return f"configs/{'' if self.short else '8gpu/'}fishertune_dinov2.yaml"

    @property
    def options(self) -> list[str]:
        """The keys of the small model, and values, in turn."""
        keys = SMALL | {"MODEL.VFM.WEIGHTS": self.folder / "public.safetensors"}
        return [str(word) for pair in keys.items() for word in pair]

    @property
    def run(self) -> Path:
        """OUTPUT_DIR of the training."""
        return self.folder / "run"

    def start(self, *words: object) -> subprocess.Popen:
        """Starts a command of Python in the checkout, in a group of processes of its own."""
        environment = {
            **os.environ,
            "DETECTRON2_DATASETS": str(self.folder / "datasets"),
            "FISHERTUNE_CACHE": str(self.folder / "cache"),
            "HF_HUB_OFFLINE": "1",  # otherwise every look-up waits for a network
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }
        with open(self.folder / f"{self.step}.txt", "a") as log:
            print("$ python", *words, file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def python(self, *words: object, code: int = 0) -> str:
        """Runs a command of Python to its end.

        Args:
            words: those after ``python``.
            code: the exit code that it should have.

        Returns:
            The output of the step so far.

        Raises:
            StepFailed: if it exits with another code, or is stuck.
        """
        process = self.start(*words)
        try:
            found = process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            kill(process)
            raise StepFailed(f"no end after {PATIENCE} s") from None
        said = (self.folder / f"{self.step}.txt").read_text()
        if found != code:
            raise StepFailed(f"exit code {found}: {said.strip().splitlines()[-1]}")
        return said


def kill(process: subprocess.Popen) -> None:
    """Kills a command with all its processes, as a machine that fails would."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def require(condition: object, found: str) -> None:
    """Fails the step unless the condition holds."""
    if not condition:
        raise StepFailed(found)


def scores(folder: Path) -> dict[str, float]:
    """The mIoU of each test set in a folder's results.json."""
    file = folder / "results.json"
    require(file.is_file(), f"there is no {file}")
    results = json.loads(file.read_text())
    require(not results.get("failed"), f"not scored: {results.get('failed')}")
    return results["source"] | results["targets"]


def make_data(rehearsal: Rehearsal) -> None:
    """Writes fake data sets and weights, and lets the check read them."""
    import timm  # here: the import takes seconds
    from safetensors.torch import save_file

    for dataset in DATASETS:
        if dataset.name in (TRAIN, *TEST):
            tested = 1 if rehearsal.short else TESTED
            count = TRAINED if dataset.name == TRAIN else tested
            write_dataset(rehearsal.folder / "datasets", dataset, count)
    weights = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(weights, rehearsal.folder / "public.safetensors")
    if rehearsal.short:  # a training checks the same, but reads fewer files
        return
    said = rehearsal.python("-m", "fishertune_d2.data.check", TRAIN, *TEST, code=1)
    problems = [line for line in said.splitlines() if line.startswith("Problem: ")]
    other = [line for line in problems if "pairs, " not in line]
    require(len(problems) == 1 + len(TEST) and not other, f"more than missing pairs: {other}")


def write_dataset(root: Path, dataset, count: int) -> None:
    """Writes pairs in the layout, the sizes and with the ids of a data set of the table."""
    rng = np.random.default_rng(0)
    label_map = LABEL_MAPS[dataset.label_map]
    ids = [np.flatnonzero(label_map == k)[0] for k in range(19)]  # of each class
    # BDD100K and Mapillary publish JPEGs; others name the ending, or take PNGs.
    jpeg = dataset.name.startswith(("bdd100k", "mapillary"))
    image_suffix = ".jpg" if jpeg else dataset.image_suffixes[0]
    sizes = islice(cycle(dataset.published.sizes or (VARYING,)), count)
    for i, (width, height) in enumerate(sizes):
        blocks = rng.integers(0, 19, (6, 10), dtype=np.uint8)
        classes = Image.fromarray(blocks).resize((width, height), Image.Resampling.NEAREST)
        colors = np.array(dataset.colors, dtype=np.uint8)[np.asarray(classes)]
        label = Image.fromarray(np.array(ids, dtype=np.uint8)[np.asarray(classes)])
        # Cityscapes keeps a folder for each city.
        stem = f"bonn/bonn_{i}_0" if dataset.name.startswith("cityscapes") else f"{i:05d}"
        for folder, suffix, picture in (
            (dataset.image_dir, image_suffix, Image.fromarray(colors)),
            (dataset.label_dir, dataset.label_suffixes[0], label),
        ):
            path = root / folder / f"{stem}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture.save(path, **({"compress_level": 1} if suffix.endswith("png") else {}))


def plan(rehearsal: Rehearsal) -> None:
    """Computes the cost of the real experiment, with the real model."""
    rehearsal.python("-m", "fishertune_d2.plan", "--config-file", rehearsal.config)


def train_and_kill(rehearsal: Rehearsal) -> None:
    """Trains until the tuning stage has a checkpoint, and kills all processes."""
    process = rehearsal.start("train_net.py", *_training(rehearsal))
    # The checkpoint before it is then named as the last one, too.
    next_one = rehearsal.run / f"model_{KILLED_AFTER + 1:07d}.pth"
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not next_one.is_file():
        if time.monotonic() > end:
            kill(process)
            raise StepFailed(f"no {next_one} after {PATIENCE} s")
        time.sleep(0.02)
    require(process.poll() is None, f"it ended by itself, with code {process.returncode}")
    kill(process)
    require(not (rehearsal.run / "results.json").exists(), "it ended before it was killed")


def resume(rehearsal: Rehearsal) -> None:
    """Resumes the training that was killed, to its end and its scores."""
    rehearsal.python("train_net.py", "--resume", *_training(rehearsal))
    log = (rehearsal.run / "log.txt").read_text()
    require("Starting training from iteration 0\n" in log, "no training from iteration 0")
    first = KILLED_AFTER + 1
    later = log.rpartition("Starting training from iteration ")[2].split()[0]
    require(int(later) >= first, f"it went on from iteration {later}, not {first} or later")
    require(scores(rehearsal.run).keys() == {*TEST}, "other test sets than the paper's")


def _training(rehearsal: Rehearsal) -> list[str]:
    processes = [] if rehearsal.short else ["--num-gpus", "8"]
    start = ["--config-file", rehearsal.config, *processes, *rehearsal.options]
    return [*start, "OUTPUT_DIR", str(rehearsal.run)]


def evaluate(rehearsal: Rehearsal) -> None:
    """Scores the trained model again, under two protocols."""
    config, weights = rehearsal.run / "config.yaml", rehearsal.run / "model_final.pth"
    for protocol in ("rein", "tqdm"):
        output = rehearsal.folder / protocol
        rehearsal.python(
            *("train_net.py", "--config-file", config, "--eval-only", "MODEL.WEIGHTS", weights),
            *("TEST.PROTOCOL", protocol, "OUTPUT_DIR", output),
        )
        require(scores(output).keys() == {*TEST}, f"{protocol} scored other test sets")
        named = json.loads((output / "results.json").read_text())["protocol"]["name"]
        require(named == protocol, f"the results of {protocol} name the protocol {named!r}")
    require(
        scores(rehearsal.folder / "rein") == scores(rehearsal.run),
        "the protocol rein, the default, scores other than the training did",
    )


def bench(rehearsal: Rehearsal) -> None:
    """Fills Table 1 with two seeds, two cells at a time; then finds nothing left to do."""
    words = ["table1", "--profile", "paper", "--vfm", "dinov2_vitl", "--jobs", "2"]
    if rehearsal.short:
        words += ["--methods", "freeze"]
    else:
        words += ["--seeds", "42", "43"]
    output = rehearsal.folder / "bench"
    command = ["-m", "fishertune_d2.bench", *words, "--output", str(output), "--set"]
    rehearsal.python(*command, *rehearsal.options)
    with open(output / "table1.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    require(lines, f"{output / 'table1.csv'} is empty")
    require("Not finished" not in (output / "table1.md").read_text(), "cells are not finished")
    if rehearsal.short:
        return
    before = sorted(path.stat().st_mtime for path in output.rglob("results.json"))
    rehearsal.python(*command, *rehearsal.options)
    after = sorted(path.stat().st_mtime for path in output.rglob("results.json"))
    require(before == after, "a second call repeated cells")


def export(rehearsal: Rehearsal) -> None:
    """Writes the tuned weights as a small file."""
    rehearsal.python("-m", "fishertune_d2.export", "delta", rehearsal.run)
    file = rehearsal.run / "delta.safetensors"
    require(file.is_file(), f"there is no {file}")


def report(rehearsal: Rehearsal) -> None:
    """Writes the page about the run."""
    rehearsal.python("-m", "fishertune_d2.report", rehearsal.run)
    page = rehearsal.run / "report.html"
    require(page.is_file() and TEST[0] in page.read_text(), f"{page} shows no scores")


STEPS: dict[str, Callable[[Rehearsal], None]] = {
    "data": make_data,
    "plan": plan,
    "train": train_and_kill,
    "resume": resume,
    "evaluate": evaluate,
    "bench": bench,
    "export": export,
    "report": report,
}
# The short form leaves these out.
LONG = ("plan", "evaluate", "report")


def run_steps(rehearsal: Rehearsal) -> Iterator[bool]:
    """Runs the steps in turn, prints a line about each, and yields whether it passed."""
    for name, step in STEPS.items():
        if rehearsal.short and name in LONG:
            continue
        rehearsal.step, start, found = name, time.monotonic(), ""
        try:
            step(rehearsal)
        except StepFailed as error:
            found = f"  {error}; see {rehearsal.folder / name}.txt"
        except Exception as error:  # of the rehearsal itself: the other steps can still run
            found = f"  {type(error).__name__}: {error}"
        status = "FAIL" if found else "PASS"
        print(f"{status}  {name:<10} {time.monotonic() - start:5.0f} s{found}", flush=True)
        yield not found


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: of the command line; None takes the process's own.

    Returns:
        0, or 1 if a step failed.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="one process and one cell of Table 1")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/rehearsal")
    args = parser.parse_args(arguments)
    folder = args.output.resolve()
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "data.txt").is_file():
        parser.error(f"--output {folder} holds other files: name a new folder")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "data.txt").touch()  # marks the folder as a rehearsal's, which the next one replaces
    passed = list(run_steps(Rehearsal(folder, args.short)))
    print(f"{'PASS' if all(passed) else 'FAIL'}: {sum(passed)} of {len(passed)} steps in {folder}")
    return int(not all(passed))


if __name__ == "__main__":
    sys.exit(main())
