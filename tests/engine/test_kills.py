"""SIGKILL at random moments of a run, resumed each time, against the undisturbed run.

A moment is a number of calls of functions, Python's and C's, since training began: the same on
every machine. For a longer soak, FISHERTUNE_KILLS sets how many moments are drawn in each part of
the run, and FISHERTUNE_KILL_SEED which.
"""

import json
import os
import signal
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase

from fishertune_d2.engine import Trainer

KILLS = int(os.environ.get("FISHERTUNE_KILLS", 1))
SEED = int(os.environ.get("FISHERTUNE_KILL_SEED", 0))


class _Calls(HookBase):
    """Counts the calls of a run, and kills it at one of them.

    Attributes:
        counts: at the beginning of each iteration, when it has run, and after the last.
    """

    def __init__(self, kill_at: int | None, log: Path):
        self.kill_at = kill_at
        self.log = log
        self.count = 0
        self.counts: list[int] = []

    def before_train(self) -> None:
        sys.setprofile(self._call)

    def before_step(self) -> None:
        self.counts.append(self.count)

    def after_step(self) -> None:
        self.counts.append(self.count)

    def after_train(self) -> None:
        self.counts.append(self.count)

    def _call(self, frame, event: str, argument) -> None:
        self.count += event.endswith("call")
        if self.count != self.kill_at:
            return
        sys.setprofile(None)
        names = [self.trainer.stage]
        while frame is not None:
            names.append(frame.f_code.co_name)
            frame = frame.f_back
        with self.log.open("a") as file:
            file.write(json.dumps(names) + "\n")
        os.kill(os.getpid(), signal.SIGKILL)


def _train(cfg: CfgNode, moment: int | None) -> None:
    """Begins a run or resumes it; kills it at a moment of the whole."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    whole = Path(cfg.OUTPUT_DIR).parent / "calls.json"
    if moment is not None:
        # At once, if the last kill was behind the checkpoint that this goes on from.
        moment = max(1, moment - json.loads(whole.read_text())[2 * trainer.start_iter])
    calls = _Calls(moment, Path(cfg.OUTPUT_DIR) / "kills.txt")
    trainer.register_hooks([calls])
    trainer._hooks.insert(0, trainer._hooks.pop())  # the first, so that the others' calls count
    trainer.train()
    sys.setprofile(None)
    if not whole.exists():
        whole.write_text(json.dumps([*calls.counts, calls.count]))


def test_a_run_killed_many_times_ends_as_the_undisturbed_one(tiny_cfg, start_process):
    # On a CPU, for what is asked is equality to the bit, after dozens of new processes.
    options = {"SOLVER__CHECKPOINT_PERIOD": 2, "MODEL__DEVICE": "cpu"}
    whole, parts = (tiny_cfg(name, **options) for name in ("whole", "parts"))

    def run(cfg: CfgNode, moment: int | None = None) -> int:
        process = start_process(_train, cfg, moment)
        process.join()
        return process.exitcode

    assert run(whole) == 0
    out = Path(parts.OUTPUT_DIR)
    counts = json.loads((out.parent / "calls.json").read_text())
    draw = np.random.default_rng(SEED)
    # Parts: what runs in each iteration, what follows it (checkpoints), and the evaluation.
    for start, end in pairwise(counts):
        for moment in np.sort(draw.integers(start, end, KILLS)).tolist():
            assert run(parts, moment) == -signal.SIGKILL
    assert run(parts) == 0

    killed = [json.loads(line) for line in (out / "kills.txt").open()]
    assert len(killed) == KILLS * (2 * whole.SOLVER.MAX_ITER + 1)
    for where in ("warmup", "_estimate", "tuning", "run_step", "save", "_do_eval"):
        assert any(where in names for names in killed), where
    assert not list(out.glob("*.tmp"))
    expected, got = (_everything(Path(cfg.OUTPUT_DIR)) for cfg in (whole, parts))
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value) if torch.is_tensor(value) else got[name] == value, name


def _everything(out: Path) -> dict:
    """What a run leaves: weights, moments, selection, estimate and scores."""
    files = ("selection.safetensors", "fisher.safetensors", "results.json")
    state = torch.load(out / "model_final.pth", weights_only=True)
    moments = state["trainer"]["_trainer"]["optimizer"]["state"]
    return {
        **{name: (out / name).read_bytes() for name in files},
        **state["model"],
        **{f"{i}/{key}": value for i, each in moments.items() for key, value in each.items()},
    }
