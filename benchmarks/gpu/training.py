"""Measures steps of every method in every precision, and the memory that the plan counts."""

import argparse
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.output_dir import remove_run
from fishertune_d2.fisher import FisherEstimate, Selection, Units
from fishertune_d2.plan import make_plan
from gpu.measure import (
    GIB,
    PRECISIONS,
    check,
    configure,
    counting_launches,
    counting_waits,
    intervals,
    mark,
    now,
    peak_gib,
    release,
    reset_peak,
)

# The keys that each method sets in addition to the precision. To add a method, add a line.
WAYS: dict[str, dict[str, object]] = {
    "warm-up": {"TUNING.METHOD": "freeze"},
    "fishertune": {"TUNING.METHOD": "fishertune"},
    "fishertune, neurons": {"TUNING.METHOD": "fishertune", "TUNING.UNIT": "neuron"},
    "full": {"TUNING.METHOD": "full"},
    "lora": {"TUNING.METHOD": "lora"},
}
WARM = 8  # the first iterations are not timed; meanwhile the workers fill their queues
# The goals for one step.
MOST_WAITS, MOST_LAUNCHES = 4, 1.03  # launches: the ratio of fishertune to full


class Watch:
    """Times most iterations of a trainer, and counts launches and waits in the last two.

    Attributes:
        times: the milliseconds of each timed iteration.
        entry: the other measurements.
    """

    def __init__(self, trainer: Trainer, steps: int):
        self.trainer, self.steps = trainer, steps
        self.cuda = trainer.cfg.MODEL.DEVICE != "cpu"
        self.times: list[float] = []
        self.entry: dict[str, object] = {}
        self._marks: list[object] = []
        self._counting = ExitStack()
        self._before, self._after = trainer.before_step, trainer.after_step
        trainer.before_step, trainer.after_step = self._before_step, self._after_step
        # Evaluation and files are not part of a step.
        trainer.test = lambda *_: {}
        trainer.checkpointer.save = lambda *_, **__: None
        if trainer._estimation:
            self._estimate = trainer._estimation.estimate
            trainer._estimation.estimate = self._timed_estimate

    def _timed_estimate(self) -> FisherEstimate | None:
        reset_peak(self.cuda)
        start = now(self.cuda)
        found = self._estimate()
        self.entry["estimation_seconds"] = now(self.cuda) - start
        self.entry["estimation_peak_gib"] = peak_gib(self.cuda)
        return found

    def _before_step(self) -> None:
        at = self.trainer.iter
        if at == self.steps - 2:
            self._counting.enter_context(counting_launches(self.entry))
        elif at == self.steps - 1 and self.cuda:
            self._counting.enter_context(counting_waits(self.entry))
        self._before()
        if at == 0:  # after the estimation, if there is one
            reset_peak(self.cuda)

    def _after_step(self) -> None:
        self._after()
        self._counting.close()
        at = self.trainer.iter
        if WARM - 1 <= at < self.steps - 2:
            self._marks.append(mark(self.cuda))
        if at == self.steps - 3:
            now(self.cuda)
            self.entry["peak_gib"] = peak_gib(self.cuda)
            self.times = intervals(self._marks)


class RankedOnce:
    """Replaces Selection.from_scores: for each kind of unit, all calls return the first's result.

    To rank all weights takes long, and the part ``ranking`` measures it. The cost of a step does
    not depend on which weights are selected.
    """

    def __init__(self):
        self._rank = Selection.from_scores
        self._selections: dict[str, Selection] = {}

    def __call__(
        self, scores: Mapping[str, Tensor], share: float, base: int, units: Units, *args
    ) -> Selection:
        """Ranks the scores of this kind of unit at its first call."""
        if units.unit not in self._selections:
            self._selections[units.unit] = self._rank(scores, share, base, units, *args)
        return self._selections[units.unit]


def training(args: argparse.Namespace, root: Path, save: Callable[..., None]) -> None:
    """Measures every method in every precision; checks waits and launches."""
    entries, build, ranked = [], Trainer.build_model, RankedOnce()

    def on_device(cfg: CfgNode) -> nn.Module:  # drawing 300 M random numbers takes a CPU seconds
        with torch.device(cfg.MODEL.DEVICE):
            return build(cfg)

    for precision in args.precisions:
        for way, keys in WAYS.items():
            entry: dict[str, object] = {"way": way, "precision": precision}
            entries.append(entry)
            keys = {**keys, **PRECISIONS[precision]}
            if way == "warm-up":
                keys["TUNING.WARMUP_ITERS"] = args.steps
            cfg = configure(args, root / "run", keys)
            try:
                with (
                    patch.object(Trainer, "build_model", staticmethod(on_device)),
                    patch.object(FisherEstimate, "save"),  # 2 GB
                    patch.object(Selection, "from_scores", staticmethod(ranked)),
                ):
                    remove_run(root / "run")  # of the measurement before
                    trainer = Trainer(cfg)
                    watch = Watch(trainer, args.steps)
                    (root / "run").mkdir(exist_ok=True)
                    trainer.train()
                milliseconds = median(watch.times)
                waits = trainer.storage.history("data_time").values()
                data = [s for s, iteration in waits if WARM <= iteration < args.steps - 2]
                entry["data_ms"] = 1e3 * median(data)
                entry |= {"step_ms": milliseconds, "steps": len(watch.times), **watch.entry}
                entry["images_per_second"] = 1e3 * cfg.SOLVER.IMS_PER_BATCH / milliseconds
            except Exception as error:  # the other methods can still be measured
                entry["error"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
            trainer = watch = None
            release()
            save({"training": entries}, training_checks(entries))
            print(entry, flush=True)


def training_checks(entries: list[dict]) -> list[dict]:
    """Checks that every method was measured, and that steps meet the goals."""
    failed = [
        f"{entry['way']} {entry['precision']}: {entry['error']}"
        for entry in entries
        if "error" in entry
    ]
    checks = [check(not failed, f"{len(entries)} ways and precisions", "; ".join(failed))]
    waits = {f"{r['way']} {r['precision']}": r["waits"] for r in entries if "waits" in r}
    if waits:
        most = max(waits, key=waits.get)
        words = f"at most {MOST_WAITS} waits for the device a step"
        checks.append(check(waits[most] <= MOST_WAITS, words, f"{waits[most]} ({most})"))
    for precision in PRECISIONS:
        launches = {
            entry["way"]: entry["launches"]
            for entry in entries
            if entry["precision"] == precision and entry.get("launches")  # 0 on a CPU
        }
        if {"full", "fishertune"} <= launches.keys():
            ratio = launches["fishertune"] / launches["full"]
            words = f"launches of fishertune at most {MOST_LAUNCHES} of full's, {precision}"
            checks.append(check(ratio <= MOST_LAUNCHES, words, f"{ratio:.3f}"))
    return checks


def plan(args: argparse.Namespace, root: Path, save: Callable[..., None]) -> None:
    """Plans the memory of the methods that ``training`` measures, with fishertune_d2.plan."""
    entries: list[dict] = []
    # A number takes as many bytes in TF32 as in float32.
    for precision in dict.fromkeys(p.replace("TF32", "float32") for p in args.precisions):
        for way, keys in WAYS.items():
            if way == "warm-up":
                continue
            # With a warm-up, so that the plan includes it.
            keys = {**keys, **PRECISIONS[precision], "TUNING.WARMUP_ITERS": args.steps - 1}
            for stage in make_plan(configure(args, root, keys)).stages:
                title = {"tuning": way, "warmup": "warm-up"}.get(stage.name, stage.name)
                entry = {"way": title, "precision": precision, "gib": stage.memory.total / GIB}
                if entry not in entries:
                    entries.append(entry)
            save({"plan": entries}, [check(True, "planned", f"{len(entries)} stages")])
