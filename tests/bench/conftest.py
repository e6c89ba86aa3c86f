"""A command that writes the files of train_net.py in milliseconds."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fishertune_d2.bench import __main__ as bench
from fishertune_d2.bench import tasks

FAKE = """
import json, os, pathlib, sys, time
folder = pathlib.Path(os.environ["FAKE"])
words = sys.argv[1:]
options = {key: words[i + 1] for i, key in enumerate(words[:-1])}
out = pathlib.Path(options["OUTPUT_DIR"])
out.mkdir(parents=True, exist_ok=True)
name = out.name
with open(folder / "calls.jsonl", "a") as log:
    gpu, threads = (os.environ.get(key) for key in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
    call = {"name": name, "words": words, "options": options, "gpu": gpu, "threads": threads}
    print(json.dumps(call), file=log)
def wait(kind):
    other, end = folder / kind / name, time.monotonic() + 20
    while other.exists() and other.read_text() not in (folder / "calls.jsonl").read_text():
        if time.monotonic() > end:
            sys.exit(4)
        time.sleep(0.01)
wait("hold")
for key in ("TUNING.WARMUP_CHECKPOINT", "FISHER.ESTIMATE"):
    if options.get(key):
        open(options[key]).close()  # must be there by now
evaluating = "--eval-only" in words
if not evaluating:
    (out / "model_0000149.pth").touch()
    if not options["TUNING.WARMUP_CHECKPOINT"]:
        (out / "model_warmup.pth").write_text(f"warm-up of {name}")
    (out / "fisher.safetensors").write_text(f"estimate of {name}")
    wait("linger")
    if (folder / "kill" / name).exists():
        (folder / "kill" / name).unlink()
        sys.exit(int(os.environ.get("FAKE_EXIT", "75")))
    (out / "model_final.pth").touch()
else:
    open(options["MODEL.WEIGHTS"]).close()
scores = json.loads((folder / "scores.json").read_text())
method, seed = options["TUNING.METHOD"], int(options["SEED"])
rate = options.get("SOLVER.BACKBONE_MULTIPLIER", "")
base = scores.get(f"{method} {rate}".strip(), scores.get(method, 40.0)) + seed % 10 / 10
sets = eval(options["DATASETS.TEST"])
config, small = options["--config-file"], ("/camvid/", "/streets/", "/long/")
seen = {n: base + 10 for n in sets if "day" in n}
unseen = {n: base for n in sets if "day" not in n}
(out / "results.json").write_text(json.dumps({
    "source": seen, "targets": unseen, "target_average": base if unseen else None,
    "per_class": {n: {} for n in sets},
    "protocol": {
        "seed": seed, "commit": "abc", "classes": {n: [] for n in sets},
        # The paper's configs are for GPUs.
        "precision": "float32" if any(p in config for p in small) else "bfloat16",
    },
    "tuned_parameters": 1000, "backbone_parameters": 20000,
}))
"""


class FakeRuns:
    """Calls the bench with the fake command, and records the calls.

    Args:
        folder: The folder for everything.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.output = folder / "out"
        self.cells = self.output / "dinov2_vits"
        (folder / "kill").mkdir()
        (folder / "hold").mkdir()
        (folder / "linger").mkdir()
        (folder / "fake.py").write_text(FAKE)
        self.score({})

    def score(self, scores: dict[str, float]) -> None:
        """Sets the mIoU of a method, or of a method and its rate, at dusk (10 higher by day)."""
        (self.folder / "scores.json").write_text(json.dumps(scores))

    def kill(self, name: str) -> None:
        """Lets the next training in this folder exit before its end."""
        (self.folder / "kill" / name).touch()

    def hold(self, name: str, until: str) -> None:
        """Lets the training in this folder wait until the training in another has begun."""
        (self.folder / "hold" / name).write_text(f'"name": "{until}"')

    def linger(self, name: str, until: str) -> None:
        """As ``hold``, but after the training has written its warm-up and its estimate."""
        (self.folder / "linger" / name).write_text(f'"name": "{until}"')

    def calls(self) -> list[dict]:
        """Returns the calls since the last time."""
        log = self.folder / "calls.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    def __call__(self, *arguments: str, profile: str = "camvid") -> int:
        """Runs the bench."""
        return bench.main(
            [*arguments, "--profile", profile, "--output", str(self.output)],
            [sys.executable, str(self.folder / "fake.py")],
        )


@pytest.fixture
def runs(tmp_path) -> Iterator[FakeRuns]:
    """The bench with a command that trains nothing; no data set counts as missing."""
    with _fake_runs(tmp_path) as runs:
        yield runs


@pytest.fixture(scope="module")
def shared_runs(tmp_path_factory) -> Iterator[FakeRuns]:
    """As ``runs``, once for all tests of a module."""
    with _fake_runs(tmp_path_factory.mktemp("runs")) as runs:
        yield runs


@contextmanager
def _fake_runs(folder: Path) -> Iterator[FakeRuns]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE", str(folder))
        patch.setattr(tasks, "load_datasets", lambda names: [])
        yield FakeRuns(folder)


@pytest.fixture
def names() -> Callable[[list[dict]], list[str]]:
    """Returns the names of the folders that calls were for."""
    return lambda calls: [call["name"] for call in calls]
