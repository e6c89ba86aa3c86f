"""The parts of the check; needs only Python's standard library."""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from gpu_check.demo import ROOT, demo_command, demo_scores, read_scores

# Points of mIoU between two trainings that begin alike. Trainings with two versions of torch on one
# CPU had losses within 0.4 % after 20 iterations, and ended 2.0 points apart.
SCORES_WITHIN = 4.0
SAME_WEIGHTS_WITHIN = 0.3  # points of mIoU of one model on two devices
LOSS_WITHIN = 0.02  # the loss after 20 iterations, as a ratio
# The tests that pytest runs, on the device in FISHERTUNE_TEST_DEVICE.
TESTS = (
    "tests/gpu",
    "tests/fisher",
    "tests/tuning/test_selected_weights.py",
    "tests/engine/test_step_trainer.py",
    "tests/engine/test_trainer.py",
)
PREEMPTED = 75  # the exit code of fishertune_d2/engine/preemption.py


class PartFailed(Exception):
    """Raised with the reason why a part cannot continue."""


@dataclass
class Part:
    """One part of the check while it runs.

    Attributes:
        name: a key of PARTS.
        args: the command line.
        deadline: the end of its time, on the clock of time.monotonic.
        environment: the environment variables of its processes.
        work: a folder of its own.
        figures: its measurements.
        checks: its requirements and their results: dicts with ``ok``, ``what`` and ``found``.
    """

    name: str
    args: argparse.Namespace
    deadline: float
    environment: dict[str, str]
    work: Path
    figures: dict = field(default_factory=dict)
    checks: list[dict] = field(default_factory=list)

    @property
    def device(self) -> str:
        """MODEL.DEVICE."""
        return self.args.device

    def check(self, ok: bool, what: str, found: str = "") -> None:
        """Records whether a requirement is met."""
        self.checks.append({"ok": bool(ok), "what": what, "found": found})

    def start(self, *words: object) -> subprocess.Popen:
        """Starts Python with these arguments, and sends its output to the log of the part."""
        with (self.work / "log.txt").open("a") as log:
            print("$ python", *words, file=log, flush=True)
            return subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(
        self, process: subprocess.Popen, until: Callable[[], bool] = lambda: False
    ) -> int | None:
        """Waits for a process to end, or for a condition.

        Returns:
            The exit code, or None if the condition came first.

        Raises:
            PartFailed: if the part's time is over; the process is ended.
        """
        while process.poll() is None:
            if until():
                return None
            if time.monotonic() > self.deadline or STOP.is_set():
                end(process)
                raise PartFailed("its time is over")
            time.sleep(0.1)
        return process.returncode

    def python(self, *words: object) -> int:
        """Runs Python with these arguments, and returns the exit code."""
        return self.wait(self.start(*words))

    def log(self) -> str:
        """Returns the output of its processes so far."""
        log = self.work / "log.txt"
        return log.read_text(errors="replace") if log.is_file() else ""

    def benchmark(self, *names: str) -> None:
        """Runs parts of benchmarks/gpu, and copies their figures as they come."""
        file = self.work / "figures.json"
        options = ["--device", self.device, "--output", file]
        if self.args.dry_run:
            options += ["--tiny", "--steps", "12", "--precisions", "float32"]
        for name in names:
            process = self.start("benchmarks/gpu", name, *options)
            try:
                code = self.wait(process, lambda file=file: self._take(file))
            finally:
                self._take(file)
            self.checks += self.figures.get("checks", {}).get(name, [])
            if code:
                self.check(False, f"benchmarks/gpu {name}", last_line(self.log()))
        self.figures.pop("checks", None)

    def _take(self, file: Path) -> bool:
        if file.is_file():
            self.figures |= json.loads(file.read_text())
        return False

    def need(self, path: Path, remedy: str) -> Path:
        """Returns ``path``.

        Raises:
            PartFailed: if there is no such file or folder.
        """
        if not path.exists():
            raise PartFailed(f"there is no {path}: {remedy}")
        return path


STOP = threading.Event()


def end(process: subprocess.Popen) -> None:
    """Ends a process and its children."""
    process.terminate()  # torchrun forwards this to its workers, which have their own sessions
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def last_line(text: str) -> str:
    """Returns the last line that is not empty, or an empty text."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def setup(part: Part) -> None:
    """Unpacks the carried wheels, and runs the doctor."""
    site, wheels = part.args.site, sorted((part.args.carried / "wheels").glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    code = part.python("-m", "fishertune_d2.doctor")
    problems = [line.strip() for line in part.log().splitlines() if line.startswith("  x")]
    part.check(code == 0, f"doctor, with {len(wheels)} carried wheels", "; ".join(problems))
    if part.python("tools/gpu_check/about.py", part.device):
        raise PartFailed(f"the device cannot be read: {last_line(part.log())}")
    part.figures["about"] = json.loads(last_line(part.log()))


def tests(part: Part) -> None:
    """Runs the core tests on the device; compares F, selections and spectra with the CPU."""
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *part.args.tests]
    if importlib.util.find_spec("xdist"):
        words += ["-n", "6"]  # each process takes memory of the device
    if part.args.dry_run:
        words += ["--collect-only"]
    part.environment["FISHERTUNE_TEST_DEVICE"] = part.device
    code = part.python(*words)
    part.check(code == 0, "core tests", last_line(part.log()))
    part.figures["tests"] = last_line(part.log())
    part.benchmark("agreement")


def demo(part: Part) -> None:
    """Trains the demo on the device; compares its scores with those of a training on a CPU."""
    carried, output = part.args.carried, part.work / "demo"
    remedy = "run tools/gpu_check/carry.py and name its folder by --carried"
    weights = part.need(carried / "weights.safetensors", remedy)
    reference = json.loads(part.need(carried / "reference.json", remedy).read_text())
    if part.python(*demo_command(part.device, weights, output), *part.args.demo):
        raise PartFailed(f"training failed: {last_line(part.log())}")
    scores = demo_scores(output)
    part.figures["demo"] = {"reference": reference, "scores": scores}
    means = [sum(each["mIoU"].values()) / len(each["mIoU"]) for each in (scores, reference)]
    found = f"{means[0]:.2f} and {means[1]:.2f}"
    close = abs(means[0] - means[1]) <= SCORES_WITHIN
    part.check(close, f"mean mIoU within {SCORES_WITHIN} points of a CPU's", found)
    first = min(reference["losses"], key=int)
    losses = [scores["losses"].get(first, float("nan")), reference["losses"][first]]
    close = abs(losses[0] / losses[1] - 1) <= LOSS_WITHIN
    words = f"loss after {int(first) + 1} iterations within {LOSS_WITHIN:.0%} of a CPU's"
    part.check(close, words, "{:.3f} and {:.3f}".format(*losses))
    again = part.work / "on_cpu"
    command = demo_command("cpu", weights, again, "--eval-only")
    if part.python(*command, *part.args.demo, "MODEL.WEIGHTS", output / "model_final.pth"):
        raise PartFailed(f"the evaluation on the CPU failed: {last_line(part.log())}")
    here = read_scores(again)
    part.figures["demo"]["on_cpu"] = here
    most = max(abs(here[name] - score) for name, score in scores["mIoU"].items())
    words = f"the same weights on the CPU: mIoU within {SAME_WEIGHTS_WITHIN} points"
    part.check(most <= SAME_WEIGHTS_WITHIN, words, f"{most:.3f}")


def resume(part: Part) -> None:
    """Stops torchrun with one process in the tuning stage, and resumes it."""
    weights = part.need(part.args.carried / "weights.safetensors", "run tools/gpu_check/carry.py")
    output = part.work / "resumed"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    keys = [*part.args.demo, "DATASETS.TEST", '("streets_day_val",)']
    process = part.start(*torchrun, *demo_command(part.device, weights, output), *keys)
    log = output / "log.txt"

    def tuning() -> bool:
        return log.is_file() and "Stage tuning" in log.read_text()

    if part.wait(process, tuning) is not None:
        raise PartFailed(f"training ended before the tuning stage: {last_line(part.log())}")
    process.terminate()
    code = part.wait(process)
    said = f"leaving with exit code {PREEMPTED}" in log.read_text()
    part.check(said, f"SIGTERM: the process leaves with {PREEMPTED}", f"torchrun with {code}")
    there = (output / "model_preempted.pth").is_file()
    part.check(there, "SIGTERM: a checkpoint", "" if there else "no model_preempted.pth")
    code = part.python(*torchrun, *demo_command(part.device, weights, output, "--resume"), *keys)
    part.check(code == 0, "--resume: ends with 0", "" if code == 0 else last_line(part.log()))
    went_on = log.read_text().count("Starting training from iteration") == 2
    part.check(went_on, "--resume: continues from the checkpoint", "")


def plan(part: Part) -> None:
    """Counts memory with fishertune_d2.plan on the CPU, to compare it with the peaks."""
    part.benchmark("plan")


def steps(part: Part) -> None:
    """Measures steps of ViT-L: time, memory, waits and launches."""
    part.benchmark("training")


def evaluation(part: Part) -> None:
    """Measures the evaluation of an image of Cityscapes' size by ViT-L."""
    part.benchmark("evaluation")


def fisher(part: Part) -> None:
    """Measures the Fisher information of ViT-L, batched and in a loop."""
    part.benchmark("fisher")


def ranking(part: Part) -> None:
    """Measures the ranking of 277 million scores."""
    part.benchmark("ranking")


def camvid(part: Part) -> None:
    """Trains full fine-tuning and FisherTune on CamVid, at the same time."""
    weights = part.need(part.args.carried / "weights.safetensors", "run tools/gpu_check/carry.py")
    data = part.need(part.args.camvid, "run tools/gpu_check/carry.py --only camvid")
    part.environment["DETECTRON2_DATASETS"] = str(data.resolve())
    iterations, entries = part.args.steps, part.figures.setdefault("camvid", [])

    def train(method: str) -> None:
        output, start = part.work / method, time.monotonic()
        keys = {
            "MODEL.DEVICE": part.device,
            "MODEL.VFM.WEIGHTS": weights,
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.CHECKPOINT_PERIOD": iterations,
            "TUNING.WARMUP_ITERS": iterations // 2,
            "TUNING.WARMUP_CHECKPOINT": "",
            "DATALOADER.NUM_WORKERS": 4,
            "OUTPUT_DIR": output,
        }
        words = [word for pair in keys.items() for word in pair]
        code = part.python("train_net.py", "--config-file", f"configs/camvid/{method}.yaml", *words)
        found = "" if code == 0 else last_line(part.log())
        part.check(code == 0, f"{method}: {iterations:,} iterations", found)
        if code == 0:
            entry = {"method": method, "iterations": iterations, "mIoU": read_scores(output)}
            entries.append({**entry, "seconds": time.monotonic() - start})

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(train, ("full", "fishertune")))


# By name: the function and its time limit in seconds. Parts of one group run at the same time. The
# last parts measure, so each has the GPU to itself.
PARTS: dict[str, tuple[Callable[[Part], None], int]] = {
    "setup": (setup, 60),
    "tests": (tests, 170),
    "demo": (demo, 170),
    "resume": (resume, 170),
    "plan": (plan, 170),
    "steps": (steps, 170),
    "evaluation": (evaluation, 60),
    "fisher": (fisher, 60),
    "ranking": (ranking, 100),
    "camvid": (camvid, 420),
}
GROUPS = (
    ("setup",),
    ("tests", "demo", "resume", "plan"),
    *((name,) for name in ("steps", "evaluation", "fisher", "ranking", "camvid")),
)
