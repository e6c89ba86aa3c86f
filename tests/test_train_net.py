"""The command itself, as a user types it: training, --eval-only, and data that are missing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "MODEL.VFM.NAME tiny MODEL.VFM.WEIGHTS random MODEL.VFM.PATCH_SIZE 16 "
    "MODEL.SEM_SEG_HEAD.CONVS_DIM 32 MODEL.SEM_SEG_HEAD.MASK_DIM 32 "
    "MODEL.MASK_FORMER.HIDDEN_DIM 32 "
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64 INPUT.CROP.SIZE [48,64] INPUT.MIN_SIZE_TRAIN [48] "
    "SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 2 TUNING.WARMUP_ITERS 1 FISHER.BATCHES 1 "
    "FISHER.IMS_PER_BATCH 2 TEST.PICTURES 1"
).split()


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


def _train_net(data: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(data),
        "FISHERTUNE_CACHE": str(data / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "train_net.py", "--config-file", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_trains_then_evaluates_from_the_checkpoint(camvid):
    config, out = "configs/camvid/fishertune.yaml", camvid / "out"
    options = [
        *TINY,
        *("TUNING.WARMUP_CHECKPOINT", ""),
        *("DATASETS.TEST", '("camvid_day_train","camvid_dusk_dev")'),
    ]
    run = _train_net(camvid, config, *options, "OUTPUT_DIR", str(out))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "average over unseen" in run.stdout
    assert f"Map of what was selected: {out / 'selection.png'}" in run.stdout
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


def test_missing_data_end_in_the_expected_tree(tmp_path):
    out = str(tmp_path / "out")
    run = _train_net(tmp_path, "configs/fishertune_dinov2.yaml", "OUTPUT_DIR", out)
    assert run.returncode == 1
    assert "15.21 M of 304.20 M backbone weights will be tuned" in run.stdout
    for folder in ("gta/images", "cityscapes/gtFine/val", "bdd100k/images/10k/val", "mapillary"):
        assert folder in run.stderr
    assert "set DETECTRON2_DATASETS" in run.stderr
    assert "Traceback" not in run.stderr


def _without_detectron2(code: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.modules['detectron2'] = None; {code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_without_detectron2_the_import_says_how_to_get_it():
    run = _without_detectron2("from fishertune_d2 import add_fishertune_config")
    assert run.returncode == 1
    last = run.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FisherTune needs Detectron2, which is not installed: run")
    assert "tools/install_detectron2.py" in last


def test_without_detectron2_the_fisher_information_can_be_measured():
    run = _without_detectron2("from fishertune_d2.fisher import estimate_fisher; print('here')")
    assert (run.returncode, run.stdout.strip()) == (0, "here"), run.stderr
