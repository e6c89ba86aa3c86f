"""The command in several processes: torchrun, and a SLURM job."""

import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch
from camvid_runs import TINY_CAMVID, run_new, write_camvid


@pytest.fixture
def slurm(tmp_path) -> str:
    """A PATH with SLURM's commands, as for a job of two nodes that are both this machine."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in {
        "scontrol": "echo localhost; echo elsewhere",
        "srun": '"$@" & first=$!; "$@" & second=$!; wait $first && wait $second',
        "torchrun": f'exec "{sys.executable}" -m torch.distributed.run "$@"',
    }.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.fixture
def camvid(tmp_path) -> Path:
    """A folder with a fake CamVid."""
    return write_camvid(tmp_path)


def test_torchrun_trains_and_a_slurm_job_of_two_nodes_goes_on_where_it_stopped(camvid, slurm):
    out, killed = camvid / "out", camvid / "killed"
    arguments = ["--config-file", "configs/camvid/fishertune.yaml", *TINY_CAMVID]
    arguments += ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "OUTPUT_DIR"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = run_new(camvid, *torchrun, "--nproc-per-node=2", "train_net.py", *arguments, str(out))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    logs = [(out / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    for rank, log in enumerate(logs):
        assert "2 process(es) on cpu" in log
        # Each file is written by the first process alone.
        assert log.count("Results in percent") == (rank == 0)
        assert log.count("Saving checkpoint to") == (rank == 0) * len(list(out.glob("*.pth")))
    for iteration in (1, 3, 5):
        assert (out / f"model_000000{iteration}.pth").is_file()

    # As a kill after the fourth iteration, the second of the tuning stage, would have left it.
    killed.mkdir()
    for name in ("model_0000003.pth", "fisher.safetensors", "selection.safetensors"):
        shutil.copy(out / name, killed)
    (killed / "last_checkpoint").write_text("model_0000003.pth")
    with socket.create_server(("localhost", 0)) as free:
        port = free.getsockname()[1]
    run = run_new(
        camvid, "bash", "tools/train.sbatch", *arguments, str(killed),
        PATH=slurm, PORT=str(port), PROCESSES_PER_NODE="1", SLURM_JOB_ID="1",
        SLURM_JOB_NODELIST="localhost,elsewhere", SLURM_JOB_NUM_NODES="2",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "Starting training from iteration 4" in run.stdout
    assert (killed / "results.json").read_text() == (out / "results.json").read_text()
    models = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (out, killed)]
    torch.testing.assert_close(models[1]["model"], models[0]["model"], rtol=0, atol=0)
