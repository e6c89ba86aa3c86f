"""The real train_net.py, on a tiny model and a fake CamVid."""

import csv
import json

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.bench import __main__ as bench

TINY = (
    "MODEL.VFM.WEIGHTS random MODEL.VFM.PATCH_SIZE 16 MODEL.SEM_SEG_HEAD.CONVS_DIM 32 "
    "MODEL.SEM_SEG_HEAD.MASK_DIM 32 MODEL.MASK_FORMER.HIDDEN_DIM 32 "
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64 INPUT.CROP.SIZE [48,64] INPUT.MIN_SIZE_TRAIN [48] "
    "SOLVER.MAX_ITER 3 SOLVER.IMS_PER_BATCH 2 TUNING.WARMUP_ITERS 1 FISHER.BATCHES 1 "
    "FISHER.IMS_PER_BATCH 2 TEST.PICTURES 0"
).split()


@pytest.fixture
def camvid(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    for split, stems in {
        "train": ("0006R0_1", "0006R0_2", "0001TP_1"),
        "val": ("0016E5_1",),
        "test": ("Seq05VD_1", "0001TP_2"),
    }.items():
        for folder in (split, f"{split}annot"):
            (tmp_path / "CamVid" / folder).mkdir(parents=True)
        for stem in stems:
            image = rng.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            label = np.repeat(np.repeat(rng.integers(0, 11, (3, 4), dtype=np.uint8), 16, 0), 16, 1)
            Image.fromarray(image).save(tmp_path / "CamVid" / split / f"{stem}.png")
            Image.fromarray(label).save(tmp_path / "CamVid" / f"{split}annot" / f"{stem}.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))


def test_trains_two_entries_and_tests_one(camvid, tmp_path):
    # Two processes at once have a thread each.
    command = ["selection", "--profile", "camvid", "--vfm", "tiny", "--jobs", "2"]
    command += ["--output", str(tmp_path / "out"), "--set", *TINY]
    assert bench.main([*command, "--methods", "freeze", "fishertune"]) == 0
    cells = tmp_path / "out/tiny"
    freeze, ours = cells / "freeze_42", cells / "fishertune_42"
    assert not (ours / "model_warmup.pth").exists()  # it took that of freeze
    (warmup,) = (cells / "shared").glob("warmup_42_*.pth")
    assert warmup.samefile(freeze / "model_warmup.pth")
    (estimate,) = (cells / "shared").glob("fisher_42_*.safetensors")
    assert estimate.samefile(ours / "fisher.safetensors")
    start, frozen, tuned = (
        torch.load(path, weights_only=True)["model"]
        for path in (warmup, freeze / "model_final.pth", ours / "model_final.pth")
    )
    moved = {
        path: sum(not torch.equal(end[key], start[key]) for key in start if "backbone" in key)
        for path, end in (("freeze", frozen), ("fishertune", tuned))
    }
    assert moved["freeze"] == 0 < moved["fishertune"]
    cell = json.loads((ours / "cell.json").read_text())
    assert cell["seconds"] > 0.5 and 0.2 < cell["peak_memory_gb"] < 10
    assert cell["peak_gpu_memory_mb"] is None and cell["recipe"]["MODEL.VFM.NAME"] == "tiny"

    assert bench.main([*command, "--methods", "fishertune", "--test"]) == 0
    results = json.loads((ours / "test/results.json").read_text())
    assert list(results["source"]) == ["camvid_day_test"]
    with open(tmp_path / "out/selection_test.csv", newline="") as file:
        (line,) = (line for line in csv.DictReader(file) if line["set"] == "camvid_dusk_test")
    assert float(line["mean"]) == pytest.approx(results["targets"]["camvid_dusk_test"], abs=1e-3)
