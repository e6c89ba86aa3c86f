"""Runs checks and measurements on one GPU without network, in at most 8 minutes.

    tools/gpu_check.sh                    # needs a GPU, and what tools/gpu_check/carry.py made
    tools/gpu_check.sh --parts camvid     # needs a GPU and CamVid; 5 minutes more
    tools/gpu_check.sh --dry-run          # on a CPU, with toy models; 2 minutes
    tools/gpu_check.sh --page             # writes docs/results/gpu.md from docs/results/gpu.json

The command prints a line for each part, with PASS or FAIL and the seconds. Below the line it lists
the requirements that the part missed. While the parts run, it rewrites gpu.json, and collects their
output in gpu_check.log. If a part fails or exceeds its time, the next part still runs. The exit
status is 1 if a part failed.

This file needs only Python's standard library, because the first part unpacks Detectron2.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gpu_check.demo import ROOT, TOY, commit
from gpu_check.page import write_page
from gpu_check.parts import GROUPS, PARTS, STOP, TESTS, Part, PartFailed, last_line

PLAN_WITHIN = 0.3  # the largest difference from the measured peak, as a ratio
WRITING = threading.Lock()  # parts end in threads of their own


def run_part(part: Part) -> dict:
    """Runs a part, and returns its result; a part that fails raises nothing here."""
    start = time.monotonic()
    try:
        PARTS[part.name][0](part)
    except PartFailed as error:
        part.check(False, part.name, str(error))
    except Exception as error:  # an error of the check itself: the other parts can still run
        part.check(False, part.name, f"{type(error).__name__}: {error}")
    missed = [each for each in part.checks if not each["ok"]]
    words = f"{len(part.checks)} checks" if not missed else f"{len(missed)} of {len(part.checks)}"
    words += " missed" if missed else " met"
    status, seconds = "FAIL" if missed else "PASS", time.monotonic() - start
    lines = [f"{status}  {part.name:<10} {seconds:5.0f} s  {words}"]
    lines += [f"      - {each['what']}: {each['found']}" for each in missed]
    with WRITING:
        print("\n".join(lines), flush=True)
        with (part.args.output / "gpu_check.log").open("a") as log:
            print(f"==== {part.name}", part.log(), *lines, sep="\n", file=log)
    return {"status": status, "seconds": round(seconds, 1), "checks": part.checks}


def compare_plan(figures: dict) -> list[dict]:
    """Compares the planned with the measured memory, if both are known."""
    planned = {(r["way"], r["precision"]): r["gib"] for r in figures.get("plan", [])}
    checks = []
    for entry in figures.get("training", []):
        # The plan does not distinguish TF32 from float32.
        precision = "float32" if entry["precision"] == "TF32" else entry["precision"]
        for way, prefix in ((entry["way"], ""), ("estimation", "estimation_")):
            counted, held = planned.get((way, precision)), entry.get(f"{prefix}peak_gib")
            if counted and held:
                entry[f"{prefix}planned_gib"] = counted
                what = f"plan within {PLAN_WITHIN:.0%} of the peak: {way}, {entry['precision']}"
                found = f"{counted:.1f} planned, {held:.1f} GiB held"
                ok = abs(counted / held - 1) <= PLAN_WITHIN
                checks.append({"ok": ok, "what": what, "found": found})
    return checks


class Check:
    """Runs the requested parts, group by group, and writes gpu.json.

    Args:
        args: the command line.
        environment: the environment variables of the parts' processes.
        work: a folder for the files that they write.
    """

    def __init__(self, args: argparse.Namespace, environment: dict[str, str], work: Path):
        self.args, self.environment, self.work = args, environment, work
        self.end = time.monotonic() + args.seconds
        self.parts: dict[str, Part] = {}
        self.results: dict[str, dict] = {}

    def run(self) -> bool:
        """Runs the parts, and returns whether all passed."""
        for group in GROUPS:
            names = [name for name in group if name in ("setup", *self.args.parts)]
            with ThreadPoolExecutor(len(GROUPS[1])) as pool:
                futures = {name: pool.submit(run_part, self._make(name)) for name in names}
                while not all(future.done() for future in futures.values()):
                    self.write()
                    time.sleep(0.5)
            self.results |= {name: future.result() for name, future in futures.items()}
            self.write()
        return all(result["status"] == "PASS" for result in self.results.values())

    def _make(self, name: str) -> Part:
        deadline = min(time.monotonic() + PARTS[name][1], self.end)
        work = self.work / name
        work.mkdir()
        part = Part(name, self.args, deadline, dict(self.environment), work)
        self.parts[name] = part
        return part

    def write(self) -> None:
        """Writes the results so far; a reader always finds a whole file."""
        figures: dict = {}
        for part in self.parts.values():
            figures |= json.loads(json.dumps(part.figures))  # a copy: the thread continues
        figures.pop("checks", None)
        if checks := compare_plan(figures):
            missed = not all(each["ok"] for each in checks)
            self.results["memory"] = {"status": "FAIL" if missed else "PASS", "checks": checks}
        about = {"commit": self.args.commit, "dry_run": self.args.dry_run}
        text = json.dumps({**about, "parts": self.results, **figures}, indent=1)
        growing = self.args.output / "gpu.growing"
        growing.write_text(text + "\n")
        growing.replace(self.args.output / "gpu.json")


def make_environment(args: argparse.Namespace) -> dict[str, str]:
    """Returns the environment of the parts' processes: packages, data, and no network."""
    path = [str(args.site), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, path)),
        "DETECTRON2_DATASETS": str(args.carried / "datasets"),
        "HF_HUB_OFFLINE": "1",  # otherwise every look-up waits for a network
        "PYTHONUNBUFFERED": "1",
    }


def make_toys(args: argparse.Namespace, work: Path) -> None:
    """Makes the files that a dry run uses in place of the carried folder."""
    words = ["tools/gpu_check/carry.py", "--toy", "--only", "weights", "scenes", "reference"]
    words = [sys.executable, *words, "--output", work]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"the files of the dry run cannot be made: {last_line(done.stdout + done.stderr)}")


def read_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    usual = [name for name in PARTS if name != "camvid"]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=usual, metavar="PART")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/gpu_check")
    parser.add_argument("--carried", type=Path, default=ROOT / "outputs/gpu_carry")
    parser.add_argument("--camvid", type=Path, default=ROOT / "outputs/gpu_camvid")
    parser.add_argument("--steps", type=int, default=3000, help="iterations of the part camvid")
    parser.add_argument("--seconds", type=float, default=470, help="time after which all parts end")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="the tests that pytest runs")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--commit", help="commit of the checkout, if this is a copy without git")
    parser.add_argument("--dry-run", action="store_true", help="toy models on a CPU")
    parser.add_argument(
        "--page", nargs="*", type=Path, metavar="FILE", help="only write docs/results/gpu.md"
    )
    args = parser.parse_args(arguments)
    args.output, args.carried = args.output.resolve(), args.carried.resolve()
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        arguments: the command line; None takes that of the process.

    Returns:
        0, or 1 if a part failed.
    """
    args = read_arguments(arguments)
    if args.page is not None:
        write_page(args.page)
        return 0
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "gpu_check.log").unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: STOP.set())
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        args.site, args.demo, args.commit = work / "site", [], args.commit or commit()
        if args.dry_run:
            args.device, args.carried = "cpu", work / "gpu_carry"
            args.demo = [str(word) for pair in TOY.items() for word in pair]
            if {"demo", "resume"} & set(args.parts):
                make_toys(args, work)
        passed = Check(args, make_environment(args), work).run()
    print(f"{'PASS' if passed else 'FAIL'}: figures in {args.output / 'gpu.json'}")
    return int(not passed)
