#!/usr/bin/env python
"""Which selection to use: trains one run per row and seed on CamVid's day, scores it on dev sets.

    python benchmarks/selection.py --rows fishertune fisher delta_fisher random --seeds 42 43 44
    python benchmarks/selection.py                                # every row, seed 42
    python -m fishertune_d2.analysis.rows outputs/selection       # the table and the figure
    python benchmarks/selection.py --test --rows fishertune ...   # once, at the very end

Needs CamVid under $DETECTRON2_DATASETS. A run that is finished is not repeated, so the command can
be stopped and started. About 10 minutes a run on two CPU cores. ``--jobs 2`` trains two runs side
by side with a thread each, which does more in the same time.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Row -> config, the row whose estimate it selects from (None: it makes its own, if any), options.
ROWS: dict[str, tuple[str, str | None, list[str]]] = {
    "freeze": ("freeze", None, []),
    "full": ("full", None, []),
    "fishertune": ("fishertune", None, []),
    "fisher": ("fishertune", "fishertune", ["TUNING.METHOD", "fisher"]),
    "delta_fisher": ("fishertune", "fishertune", ["TUNING.METHOD", "delta_fisher"]),
    "random": ("fishertune", None, ["TUNING.METHOD", "random"]),
    "random_q": ("fishertune", None, ["TUNING.METHOD", "random_q"]),
    "random_k": ("fishertune", None, ["TUNING.METHOD", "random_k"]),
    "random_v": ("fishertune", None, ["TUNING.METHOD", "random_v"]),
    "eq7": ("fishertune", "fishertune", ["FISHER.FORM", "eq7"]),
    "eq15": ("fishertune", "fishertune", ["FISHER.FORM", "eq15"]),
    "rank": ("fishertune", "fishertune", ["FISHER.FORM", "rank"]),
    "share_1": ("fishertune", "fishertune", ["TUNING.D_MAX", "0.01"]),
    "share_20": ("fishertune", "fishertune", ["TUNING.D_MAX", "0.2"]),
    "smoothed": ("fishertune", None, ["FISHER.ESTIMATOR", "smoothed"]),
    "natural": ("fishertune", None, ["FISHER.ESTIMATOR", "natural"]),
    "variational": ("fishertune", None, ["FISHER.ESTIMATOR", "variational"]),
    "fisher_variational": ("fishertune", "variational", ["TUNING.METHOD", "fisher"]),
    "sampled_labels": ("fishertune", None, ["FISHER.LABELS", "sampled"]),
    "shift_embedding": ("fishertune", None, ["FISHER.PERTURB.POINTS", "[0]"]),
    "shift_blocks": ("fishertune", None, ["FISHER.PERTURB.POINTS", "[1, 2, 3]"]),
}
TEST_SETS = ["DATASETS.TEST", '("camvid_day_test", "camvid_dusk_test")']


class Runner:
    """Trains and tests cells, a row with a seed, each in a folder <row>_<seed>.

    Args:
        output: where the folders are.
        jobs: cells at a time, each with its share of the cores.
    """

    def __init__(self, output: Path, jobs: int):
        self.output = output
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        self.pool = ThreadPoolExecutor(jobs)

    def train(self, names: list[str], seeds: list[int]) -> None:
        """First the shared warm-ups, then what others select from, then the rest."""
        sources = {source for name in names if (source := ROWS[name][1])}
        waves = [["freeze"], [name for name in ROWS if name in sources], names]
        done: set[str] = set()
        for wave in waves:
            cells = [(name, seed) for name in wave if name not in done for seed in seeds]
            done |= set(wave)
            for line in self.pool.map(lambda cell: self._run(*cell, self.output, []), cells):
                print(line, flush=True)

    def test(self, names: list[str], seeds: list[int]) -> None:
        """Scores trained cells on the test sets, into the folder ``test``."""

        def score(cell: tuple[str, int]) -> str:
            name, seed = cell
            weights = self.output / f"{name}_{seed}" / "model_final.pth"
            options = ["--eval-only", "MODEL.WEIGHTS", str(weights), *TEST_SETS]
            return self._run(name, seed, self.output / "test", options)

        for line in self.pool.map(score, [(name, seed) for name in names for seed in seeds]):
            print(line, flush=True)

    def _run(self, name: str, seed: int, output: Path, extra: list[str]) -> str:
        """Runs train_net.py, unless its results are there; returns what to say of it."""
        folder = output / f"{name}_{seed}"
        if (folder / "results.json").is_file():
            return f"{folder}: done before"
        folder.mkdir(parents=True, exist_ok=True)
        config, source, options = ROWS[name]
        command = [sys.executable, "train_net.py", "--config-file", f"configs/camvid/{config}.yaml"]
        command += [*(["--resume"] if not extra else []), *extra, "SEED", str(seed)]
        command += ["OUTPUT_DIR", str(folder), "SOLVER.CHECKPOINT_PERIOD", "150", *options]
        if name != "freeze":
            warmup = self.output / f"freeze_{seed}/model_warmup.pth"
            command += ["TUNING.WARMUP_CHECKPOINT", str(warmup)]
        if source is not None:
            estimate = self.output / f"{source}_{seed}/fisher.safetensors"
            command += ["FISHER.ESTIMATE", str(estimate)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with open(folder / "stdout.txt", "a") as log:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
        if done.returncode:
            return f"{folder}: failed with exit code {done.returncode}, see stdout.txt there"
        for checkpoint in folder.glob("model_0*.pth"):
            checkpoint.unlink()  # 260 MB each; model_warmup.pth and model_final.pth stay
        return f"{folder}: done"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/selection")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--test", action="store_true", help="score what is trained on test sets")
    args = parser.parse_args()
    runner = Runner(args.output.resolve(), args.jobs)
    (runner.test if args.test else runner.train)(args.rows, args.seeds)
