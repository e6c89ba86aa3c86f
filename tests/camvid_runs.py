"""Trainings of a tiny model on a fake CamVid through the command, in seconds."""

import os
import subprocess
from pathlib import Path

import numpy as np
from forked import ROOT, run_forked
from PIL import Image

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


def write_camvid(folder: Path) -> Path:
    """Writes a fake CamVid of two day and two dusk images below the folder, and returns it."""
    rng = np.random.default_rng(0)
    for part in ("train", "trainannot"):
        (folder / "CamVid" / part).mkdir(parents=True)
    for stem in ("0006R0_1", "0006R0_2", "0001TP_1", "0001TP_2"):
        image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        label = np.repeat(np.repeat(rng.integers(0, 11, (3, 4), dtype=np.uint8), 16, 0), 16, 1)
        Image.fromarray(image).save(folder / "CamVid/train" / f"{stem}.png")
        Image.fromarray(label).save(folder / "CamVid/trainannot" / f"{stem}.png")
    return folder


def run_new(data: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs a command in a new process, as a user does."""
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": str(data),
        "FISHERTUNE_CACHE": str(data / "cache"),
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def run_train_net(data: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Runs the script in a fork, which saves its imports."""
    variables = {"DETECTRON2_DATASETS": str(data), "FISHERTUNE_CACHE": str(data / "cache")}
    return run_forked("train_net.py", ["--config-file", *arguments], data, **variables)
