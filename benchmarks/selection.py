#!/usr/bin/env python
"""Which selection to use: trains one run per row and seed on CamVid's day, scores it on dev sets.

    python benchmarks/selection.py run --seeds 42 43 44 --rows fishertune fisher random
    python benchmarks/selection.py run                       # every row, seed 42
    python benchmarks/selection.py table > docs/results/selection.md

Needs CamVid under $DETECTRON2_DATASETS. A run that is finished is not repeated, so the command can
be stopped and started. About 8 minutes a run on two CPU cores. ``--jobs 2`` trains two runs side by
side with a thread each, which does more work in the same time.
"""

import argparse
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Rows that estimate something of their own ...
ESTIMATES = {
    "fishertune": [],
    "random": ["TUNING.METHOD", "random"],
    "random_q": ["TUNING.METHOD", "random_q"],
    "random_k": ["TUNING.METHOD", "random_k"],
    "random_v": ["TUNING.METHOD", "random_v"],
    "variational": ["FISHER.ESTIMATOR", "variational"],
    "natural": ["FISHER.ESTIMATOR", "natural"],
    "sampled_labels": ["FISHER.LABELS", "sampled"],
    "shift_embedding": ["FISHER.PERTURB.POINTS", "[0]"],
    "shift_blocks": ["FISHER.PERTURB.POINTS", "[1, 2, 3]"],
}
# ... and rows that select from the estimate of "fishertune" with the same seed.
SELECTIONS = {
    "fisher": ["TUNING.METHOD", "fisher"],
    "delta_fisher": ["TUNING.METHOD", "delta_fisher"],
    "eq7": ["FISHER.FORM", "eq7"],
    "eq15": ["FISHER.FORM", "eq15"],
    "rank": ["FISHER.FORM", "rank"],
    "share_1": ["TUNING.D_MAX", "0.01"],
    "share_20": ["TUNING.D_MAX", "0.2"],
}
ROWS = {**ESTIMATES, **SELECTIONS}


def train(name: str, seed: int, config: str, options: list[str], output: Path, threads: int):
    """Runs train_net.py, unless its results are there; returns what to say of it."""
    folder = output / f"{name}_{seed}"
    if (folder / "results.json").is_file():
        return f"{folder}: done before"
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "train_net.py", "--config-file", f"configs/camvid/{config}.yaml"]
    command += ["--resume", "SEED", str(seed), "OUTPUT_DIR", str(folder)]
    command += ["SOLVER.CHECKPOINT_PERIOD", "150", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with open(folder / "stdout.txt", "a") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    if done.returncode:
        return f"{folder}: failed with exit code {done.returncode}, see stdout.txt there"
    for checkpoint in folder.glob("model_0*.pth"):
        checkpoint.unlink()  # 260 MB each; model_warmup.pth and model_final.pth stay
    return f"{folder}: done"


def run(rows: list[str], seeds: list[int], output: Path, jobs: int) -> None:
    """Trains the rows: first the shared warm-ups, then what others select from, then the rest."""
    threads = max(1, (os.cpu_count() or 1) // jobs)

    def one(cell: tuple[str, int]) -> str:
        name, seed = cell
        if name == "freeze":
            return train(name, seed, "freeze", [], output, threads)
        options = ["TUNING.WARMUP_CHECKPOINT", str(output / f"freeze_{seed}/model_warmup.pth")]
        if name == "full":
            return train(name, seed, "full", options, output, threads)
        if name in SELECTIONS:
            shared = output / f"fishertune_{seed}/fisher.safetensors"
            options += ["FISHER.ESTIMATE", str(shared)]
        return train(name, seed, "fishertune", options + ROWS.get(name, []), output, threads)

    first = (
        ["fishertune"] if any(name in SELECTIONS or name == "fishertune" for name in rows) else []
    )
    rest = [name for name in rows if name != "fishertune"]
    with ThreadPoolExecutor(jobs) as pool:
        for names in (["freeze"], first, rest):
            cells = [(name, seed) for name in names for seed in seeds]
            for line in pool.map(one, cells):
                print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("action", choices=["run"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=[*ROWS, "full"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[42])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/selection")
    parser.add_argument("--jobs", type=int, default=1)
    args = parser.parse_args()
    run(args.rows, args.seeds, args.output.resolve(), args.jobs)
