#!/usr/bin/env python
"""Compares the seconds that the plan computes with those that short trainings take on this CPU.

    python benchmarks/plan_time.py                                     # 4 minutes on one CPU core
    python benchmarks/plan_time.py --show docs/results/plan_time.json  # the table again

Trains each config on the built-in street scenes for a few iterations: warm-up, estimation, tuning
and one evaluation. The rate of the CPU, as for --tflops of fishertune_d2.plan, is measured on the
first config: FLOPs of its tuning steps, divided by their seconds. The plan then computes, with this
one rate, the seconds of every stage of all configs. The first iteration of a stage is not timed,
because memory is allocated in it.

Seconds are those of the CPU, in one thread: on a machine that is otherwise idle, they are the
seconds of the clock. Other programs still make them longer, since they take caches and memory, so
the load is recorded. Needs no weights. Writes outputs/plan_time/plan_time.json.
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

import torch
from detectron2.config import CfgNode
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.config import read_config  # noqa: E402 - the package need not be installed
from fishertune_d2.engine import Trainer  # noqa: E402
from fishertune_d2.engine.scoring import commit  # noqa: E402
from fishertune_d2.plan import make_plan  # noqa: E402
from fishertune_d2.plan.hours import seconds  # noqa: E402
from fishertune_d2.plan.rates import EFFICIENCY  # noqa: E402

CONFIGS = ("demo.yaml", "camvid/full.yaml")
SETS = "('streets_day_val',)"


class Timed(Trainer):
    """Notes the CPU seconds of each step, of the estimation and of the evaluation."""

    def __init__(self, cfg: CfgNode):
        super().__init__(cfg)
        self.times: dict[str, list[float]] = defaultdict(list)

    def _timed(self, name: str, work):
        start = time.process_time()
        result = work()
        self.times[name].append(time.process_time() - start)
        return result

    def run_step(self) -> None:
        """One step, with the loading of its batch."""
        self._timed(self.stage, super().run_step)

    def _estimate(self):
        return self._timed("estimation", super()._estimate)

    def _evaluate(self) -> dict:
        return self._timed("evaluation", super()._evaluate)


def short_run(config: str, iterations: int, output: str) -> CfgNode:
    """A config on the street scenes, with ``iterations`` of warm-up and as many of tuning."""
    keys: dict[str, object] = {
        "MODEL.VFM.WEIGHTS": "random",
        "DATASETS.TRAIN": "('streets_day_train',)",
        "DATASETS.TEST": SETS,
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 19,
        "TEST.PICTURES": 0,
        "TEST.EXPECTED_RESULTS": [],
        "SOLVER.MAX_ITER": 2 * iterations,
        "TUNING.WARMUP_ITERS": iterations,
        "FISHER.BATCHES": max(1, iterations // 2),
        "TUNING.WARMUP_CHECKPOINT": "",
        "FISHER.ESTIMATE": "",
        "OUTPUT_DIR": output,
    }
    words = [word for key, value in keys.items() for word in (key, str(value))]
    return read_config(config, words)


def measure(cfg: CfgNode) -> dict[str, float]:
    """Trains a config; returns the seconds of each stage and of the evaluation."""
    trainer = Timed(cfg)
    trainer.model.untrained = frozenset()  # random weights may be scored: the time is the same
    trainer.train()
    times = trainer.times
    found = {}
    for name in ("warmup", "estimation", "tuning", "evaluation"):
        steps = times.get(name, [])
        if name in ("warmup", "tuning"):
            found[name] = median(steps[1:]) * len(steps)
        elif steps:
            found[name] = sum(steps)
    return found


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=10, help="of warm-up, and of tuning")
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/plan_time/plan_time.json")
    parser.add_argument("--show", type=Path, help="print the table of a file, measure nothing")
    args = parser.parse_args()
    if args.show:
        print(table(json.loads(args.show.read_text())))
        return
    torch.set_num_threads(1)
    rate, rows = None, []
    for config in args.configs:
        with tempfile.TemporaryDirectory() as folder:
            cfg = short_run(config, args.iterations, folder)
            load = os.getloadavg()[0]
            found = measure(cfg)
        plan = make_plan(cfg)
        flops = seconds(plan, dict.fromkeys(EFFICIENCY, 1.0))  # at 1 TFLOP a second
        rate = rate or flops["tuning"] / found["tuning"]
        planned = {name: value / rate for name, value in flops.items()}
        rows.append({"config": config, "load": load, "measured": found, "planned": planned})
        print(rows[-1], file=sys.stderr, flush=True)
    result = {
        "tflops": rate,
        "iterations": args.iterations,
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "commit": commit(),
        "rows": rows,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


def table(result: dict) -> str:
    """Formats planned and measured seconds as Markdown."""
    lines = []
    for row in result["rows"]:
        both = {name: (row["planned"][name], row["measured"][name]) for name in row["measured"]}
        both["all"] = tuple(sum(values) for values in zip(*both.values(), strict=True))
        for name, (planned, measured) in both.items():
            difference = f"{100 * (planned / measured - 1):+.0f} %"
            lines.append([row["config"], name, f"{measured:.1f}", f"{planned:.1f}", difference])
    headers = ["config", "stage", "measured, s", "planned, s", "difference"]
    loads = ", ".join(f"{row['load']:.1f}" for row in result["rows"])
    return (
        f"{tabulate(lines, headers, tablefmt='github', disable_numparse=True)}\n\n"
        f"{result['iterations']} iterations of warm-up and of tuning; {result['tflops']:.4f} TFLOP "
        f"a second, measured on the tuning of {result['rows'][0]['config']}; one "
        f"thread on {result['cores']} cores, load averages before the runs {loads}; torch "
        f"{result['torch']}, commit {result['commit']}."
    )


if __name__ == "__main__":
    main()
