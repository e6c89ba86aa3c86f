"""The command itself, as a user types it: training, --eval-only, torchrun, missing data."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from .forked import run_forked

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "MODEL.VFM.NAME tiny MODEL.VFM.WEIGHTS random MODEL.VFM.PATCH_SIZE 16 "
    "MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.SEM_SEG_HEAD.MASK_DIM 32 "
    "MODEL.MASK_FORMER.HIDDEN_DIM 32 "
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64 INPUT.CROP.SIZE [48,64] INPUT.MIN_SIZE_TRAIN [48] "
    "SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 2 TUNING.WARMUP_ITERS 1 FISHER.BATCHES 1 "
    "FISHER.IMS_PER_BATCH 2 TEST.PICTURES 1"
).split()
TINY_CAMVID = [
    *TINY,
    *("TUNING.WARMUP_CHECKPOINT", ""),
    *("DATASETS.TEST", '("camvid_day_train","camvid_dusk_dev")'),
]


@pytest.fixture
def camvid(tmp_path) -> Path:
    """A fake CamVid of two day and two dusk images."""
    rng = np.random.default_rng(0)
    for folder in ("train", "trainannot"):
        (tmp_path / "CamVid" / folder).mkdir(parents=True)
    for stem in ("0006R0_1", "0006R0_2", "0001TP_1", "0001TP_2"):
        image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        label = np.repeat(np.repeat(rng.integers(0, 11, (3, 4), dtype=np.uint8), 16, 0), 16, 1)
        Image.fromarray(image).save(tmp_path / "CamVid/train" / f"{stem}.png")
        Image.fromarray(label).save(tmp_path / "CamVid/trainannot" / f"{stem}.png")
    return tmp_path


def _run(data: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(data),
        "FISHERTUNE_CACHE": str(data / "cache"),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def _train_net(data: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the script in a fork, which saves its imports."""
    variables = {"DETECTRON2_DATASETS": str(data), "FISHERTUNE_CACHE": str(data / "cache")}
    return run_forked("train_net.py", ["--config-file", *arguments], data, **variables)


def test_trains_then_evaluates_from_the_checkpoint(camvid):
    config, out = str(ROOT / "configs/camvid/fishertune.yaml"), camvid / "out"
    options = TINY_CAMVID
    command = [sys.executable, "train_net.py", "--config-file", config]
    run = _run(camvid, *command, *options, "OUTPUT_DIR", str(out))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "average over unseen" in run.stdout
    assert f"Map of the selected weights: {out / 'selection.png'}" in run.stdout
    trained = json.loads((out / "results.json").read_text())
    assert list(trained["targets"]) == ["camvid_dusk_dev"]

    weights = str(out / "model_final.pth")
    again = camvid / "again"
    run = _train_net(
        camvid, config, "--eval-only", *options,
        *("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(again)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((again / "results.json").read_text()) == trained

    before = (out / "config.yaml").read_text()
    other = ["SOLVER.BASE_LR", "0.5", "OUTPUT_DIR", str(out)]
    run = _train_net(camvid, config, "--resume", *options, *other)
    assert run.returncode == 1
    assert "SOLVER.BASE_LR was 0.0003 and is 0.5" in run.stderr
    assert (out / "config.yaml").read_text() == before  # of the run that is there


def _sentence(run: subprocess.CompletedProcess) -> str:
    """The one sentence that a command ended in."""
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_used_folder_is_refused_or_overwritten_and_random_weights_are_not_scored(camvid):
    out = camvid / "out"
    config, options = "camvid/freeze.yaml", [*TINY_CAMVID, "OUTPUT_DIR", str(out)]
    first = _train_net(camvid, config, *options, "SEED", "1")
    assert first.returncode == 0, first.stderr[-2000:]
    scores = (out / "results.json").read_text()

    for more in ([], ["--num-gpus", "2"]):
        again = _sentence(_train_net(camvid, config, *more, *options))
        assert "holds another run" in again and "--resume" in again and "--overwrite" in again
    both = _sentence(_train_net(camvid, config, "--resume", "--overwrite", *options))
    assert "choose one" in both
    # The folder's config would do, but the command names no weights.
    unnamed = _sentence(_train_net(camvid, config, "--eval-only", *options))
    assert f"add MODEL.WEIGHTS {out / 'model_final.pth'}, or --resume" in unnamed
    scored = ["OUTPUT_DIR", str(camvid / "scored"), "MODEL.WEIGHTS", str(out / "model_final.pth")]
    other = _train_net(camvid, config, "--eval-only", *TINY_CAMVID, *scored, "INPUT.FORMAT", "BGR")
    assert "INPUT.FORMAT was 'RGB' and is 'BGR'" in _sentence(other)
    assert (out / "results.json").read_text() == scores

    anew = _train_net(camvid, config, "--overwrite", *options, "SEED", "2")
    assert anew.returncode == 0, anew.stderr[-2000:]
    assert json.loads((out / "results.json").read_text())["protocol"]["seed"] == 2


def test_what_stops_one_of_two_processes_is_said_in_a_sentence(tmp_path):
    out = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    command = [sys.executable, "train_net.py", "--config-file", "configs/camvid/freeze.yaml"]
    run = _run(tmp_path, *command, "--num-gpus", "2", *TINY, *out)
    assert "set DETECTRON2_DATASETS" in run.stderr
    assert run.returncode == 1 and "Traceback" not in run.stderr


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


def test_torchrun_trains_and_a_slurm_job_of_two_nodes_goes_on_where_it_stopped(camvid, slurm):
    out, killed = camvid / "out", camvid / "killed"
    arguments = ["--config-file", "configs/camvid/fishertune.yaml", *TINY_CAMVID]
    arguments += ["SOLVER.MAX_ITER", "6", "SOLVER.CHECKPOINT_PERIOD", "2", "OUTPUT_DIR"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    run = _run(camvid, *torchrun, "--nproc-per-node=2", "train_net.py", *arguments, str(out))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    logs = [(out / name).read_text() for name in ("log.txt", "log.txt.rank1")]
    for rank, log in enumerate(logs):
        assert f"Rank of current process: {rank}. World size: 2" in log
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
    run = _run(
        camvid, "bash", "tools/train.sbatch", *arguments, str(killed),
        PATH=slurm, PORT=str(port), PROCESSES_PER_NODE="1", SLURM_JOB_ID="1",
        SLURM_JOB_NODELIST="localhost,elsewhere", SLURM_JOB_NUM_NODES="2",
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "Starting training from iteration 4" in run.stdout
    assert (killed / "results.json").read_text() == (out / "results.json").read_text()
    models = [torch.load(folder / "model_final.pth", weights_only=True) for folder in (out, killed)]
    torch.testing.assert_close(models[1]["model"], models[0]["model"], rtol=0, atol=0)


def test_missing_data_end_in_the_expected_tree(tmp_path):
    out = str(tmp_path / "out")
    config = "fishertune_dinov2.yaml"
    run = _train_net(tmp_path, config, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", out)
    assert run.returncode == 1
    assert "15.21 M of 304.20 M backbone weights will be tuned" in run.stdout
    for folder in ("gta/images", "cityscapes/gtFine/val", "bdd100k/images/10k/val", "mapillary"):
        assert folder in run.stderr
    assert "set DETECTRON2_DATASETS" in run.stderr
    assert "Traceback" not in run.stderr


def _without_detectron2(code: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.modules['detectron2'] = None\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_without_detectron2_the_import_says_how_to_get_it_and_pure_pytorch_works():
    run = _without_detectron2(
        """
from fishertune_d2.fisher import estimate_fisher
for room, name in (
    ("fishertune_d2", "apply_fishertune"),
    ("fishertune_d2", "engine"),
    ("fishertune_d2.tuning", "build_tuning_method"),
):
    try:
        exec(f"from {room} import {name}")
    except ImportError as error:
        print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith("FisherTune needs Detectron2, which is not installed: run")
        assert "tools/install_detectron2.py" in line


@pytest.mark.parametrize("command", [["train_net.py"], ["demo.py"], ["-m", "fishertune_d2.train"]])
def test_without_detectron2_a_command_ends_in_one_sentence(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['detectron2'] = None")
    run = _run(tmp_path, sys.executable, *command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert run.returncode == 1
    assert run.stderr.startswith("error: FisherTune needs Detectron2, which is not installed: run")
    assert len(run.stderr.splitlines()) == 1
