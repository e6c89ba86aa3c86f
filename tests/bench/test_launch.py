"""Cells side by side on one machine, without a GPU, and the script for arrays of SLURM jobs."""

import os
import subprocess
from pathlib import Path

import pytest
import torch

from fishertune_d2.bench import launch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def machine(monkeypatch):
    """Returns a function that gives this process cores and GPUs, and names for these."""

    def give(cores: int, gpus: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(launch.os, "sched_getaffinity", lambda pid: set(range(cores)))
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)

    return give


def _table_1(runs, *options: str) -> list[dict]:
    assert runs("table1", "--vfm", "dinov2_vitl", *options, profile="paper") == 0
    return runs.calls()


def test_eight_runs_side_by_side_have_a_gpu_each(runs, machine):
    machine(cores=64, gpus=8)
    seeds = [str(seed) for seed in range(8)]
    for seed, following in zip(seeds, seeds[1:], strict=False):
        runs.hold(f"freeze_{seed}", until=f"freeze_{following}")  # so that all run at once
    calls = _table_1(runs, "--methods", "freeze", "--seeds", *seeds, "--jobs", "8")
    assert sorted(call["gpu"] for call in calls) == seeds
    assert {call["threads"] for call in calls} == {"8"}


@pytest.mark.parametrize(
    ("gpus", "visible", "expected"),
    [
        (2, "4, 7", {"4", "7"}),  # those that a scheduler gave
        (2, "GPU-1a,GPU-2b", {"GPU-1a", "GPU-2b"}),
        (1, None, {"0"}),  # more jobs than GPUs share one
        (0, "", {""}),
        (0, None, {None}),
    ],
)
def test_jobs_take_the_gpus_that_this_process_may_use(runs, machine, gpus, visible, expected):
    machine(cores=4, gpus=gpus, visible=visible)
    runs.hold("full_42", until="lora_42")
    runs.hold("lora_42", until="full_42")
    calls = _table_1(runs, "--methods", "freeze", "full", "lora", "--jobs", "2")
    assert {call["gpu"] for call in calls if call["name"] != "freeze_42"} == expected
    assert {call["threads"] for call in calls} == {"2"}


def test_a_single_job_sees_all_gpus(runs, machine):
    machine(cores=4, gpus=2, visible="4,7")
    (call,) = _table_1(runs, "--methods", "freeze")
    assert (call["gpu"], call["threads"]) == ("4,7", "4")


def test_cells_start_as_soon_as_a_running_cell_has_made_what_they_take(runs, names):
    runs.linger("freeze_42", until="fishertune_42")
    assert _table_1(runs, "--methods", "freeze", "fishertune", "--jobs", "2")
    warmup = next((runs.output / "dinov2_vitl/shared").glob("warmup_42_*.pth"))
    assert warmup.samefile(runs.output / "dinov2_vitl/freeze_42/model_warmup.pth")


def _slurm(folder: Path, exit_code: int) -> subprocess.CompletedProcess:
    """Submits tools/bench.sbatch to programs that say how they were called."""
    for name, script in {
        "srun": f'echo "srun $*"; exit {exit_code}',
        "scontrol": 'echo "scontrol $*"',
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    job = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "43", "SLURM_GPUS_ON_NODE": "8"}
    return subprocess.run(
        ["bash", "tools/bench.sbatch", "table1", "--profile", "paper"],
        cwd=ROOT,
        env={**os.environ, **job, "PATH": f"{folder}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )


def test_a_job_of_an_array_runs_one_seed_on_all_its_gpus(tmp_path):
    run = _slurm(tmp_path, 0)
    assert run.returncode == 0, run.stderr
    assert run.stdout == (
        "srun python -m fishertune_d2.bench table1 --profile paper --seeds 43 --jobs 8\n"
    )


def test_a_job_that_was_stopped_is_queued_again_and_a_failed_one_is_not(tmp_path):
    stopped = _slurm(tmp_path, 75)
    assert stopped.returncode == 75 and stopped.stdout.endswith("scontrol requeue 7_43\n")
    failed = _slurm(tmp_path, 1)
    assert failed.returncode == 1 and "requeue" not in failed.stdout


def test_jobs_of_an_array_fill_one_table(runs, monkeypatch):
    from fishertune_d2.bench import __main__ as bench

    for seed in ("42", "43"):
        assert runs("table1", "--methods", "freeze", "full", "--seeds", seed, profile="paper") == 0
    assert len(runs.calls()) == 4 * len(bench.TABLES["table1"].vfms)
    words = ("table1", "--methods", "freeze", "full", "--seeds", "42", "43", "--report")
    assert runs(*words, profile="paper") == 0 and runs.calls() == []
    assert "Not finished" not in (runs.output / "table1.md").read_text()
