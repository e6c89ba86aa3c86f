"""The examples of CONTRIBUTING.md work in a copy of the checkout, and change no other file."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from fishertune_d2.bench import __main__ as bench
from fishertune_d2.bench import tables
from fishertune_d2.fisher import UNITS, FisherEstimate, Selection, Units
from fishertune_d2.modeling import VFMS, VFMBackbone, vfm_table
from fishertune_d2.tuning import TUNING_REGISTRY

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
METHOD, VFM_ROW, DATASET_ROW, BENCH_ENTRY = BLOCKS
# Entry of a table: the file that it belongs to, and the line that opens the table.
TABLES = {
    VFM_ROW: ("fishertune_d2/modeling/vfm_table.py", "VFMS: dict[str, VFM] = {\n"),
    DATASET_ROW: (
        "fishertune_d2/data/dataset_table.py",
        "DATASETS: tuple[SemSegDataset, ...] = (\n",
    ),
    BENCH_ENTRY: ("fishertune_d2/bench/tables.py", "    for entry in (\n"),
}


@pytest.fixture
def extended(checkout) -> Path:
    """The copy of the checkout with everything that the page adds."""
    (checkout / "fishertune_d2/tuning/saliency.py").write_text(METHOD)
    for entry, (file, opening) in TABLES.items():
        assert file in TEXT
        before, after = (checkout / file).read_text().split(opening)
        (checkout / file).write_text(before + opening + entry + after)
    return checkout


def _call(checkout: Path, *command: str, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(checkout)} | variables
    run = subprocess.run(
        [sys.executable, *command], cwd=checkout, env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return run


@pytest.mark.parametrize("block", BLOCKS)
def test_each_is_about_ten_lines(block):
    without = re.sub(r'""".*?"""', "", block, flags=re.DOTALL)
    lines = [line for line in without.splitlines() if line.strip()]
    assert len([line for line in lines if not line.startswith(("from ", "import "))]) <= 10


@pytest.mark.parametrize("unit", UNITS)
def test_the_method_trains_on_the_data_set_through_the_real_trainer(unit, extended, tiny_run):
    rng = np.random.default_rng(0)
    data = extended / "datasets/kitti/training"
    for part, pixels in (("image_2", (48, 64, 3)), ("semantic", (48, 64))):
        (data / part).mkdir(parents=True)
        for i in range(3):
            ids = rng.integers(0, 34, pixels, dtype=np.uint8)  # Cityscapes'
            Image.fromarray(ids).save(data / part / f"{i:06d}_10.png")
    options = [*tiny_run, "MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19", "TUNING.METHOD", "saliency"]
    options += ["TUNING.UNIT", unit]
    options += ["DATASETS.TRAIN", '("kitti_train",)', "DATASETS.TEST", '("kitti_train",)']
    cache = str(extended / "cache")
    config = "configs/fishertune_dinov2.yaml"
    command = ["train_net.py", "--config-file", config, *options, "OUTPUT_DIR", "out"]
    _call(extended, *command, DETECTRON2_DATASETS="datasets", FISHERTUNE_CACHE=cache)

    # Recompute the formula from the run's files.
    out = extended / "out"
    estimate = FisherEstimate.load(out / "fisher.safetensors")
    start = torch.load(out / "model_warmup.pth", weights_only=True)["model"]
    scores = {name: f * start[f"backbone.{name}"] ** 2 / 2 for name, f in estimate.f.items()}
    base = sum(v.numel() for k, v in start.items() if k.startswith("backbone."))
    chosen = Selection.load(out / "selection.safetensors").masks(0.05)
    units = Units(unit, {name: tuple(score.shape) for name, score in scores.items()})
    selection = Selection.from_scores(units.mean(scores), share=0.05, base=base, units=units)
    expected, largest = selection.masks(0.05), max(group.size for group in units.groups.values())
    total = sum(int(mask.sum()) for mask in chosen.values())
    assert int(0.05 * base) - largest < total <= int(0.05 * base)
    assert chosen.keys() == expected.keys()
    assert all(torch.equal(chosen[name], mask) for name, mask in expected.items())

    tuned = torch.load(out / "model_final.pth", weights_only=True)["model"]
    moved = {name: tuned[f"backbone.{name}"] != start[f"backbone.{name}"] for name in estimate.f}
    assert sum(int(m.sum()) for m in moved.values()) > 0
    assert all(not (moved[name] & ~chosen[name]).any() for name in moved if name in chosen)


def test_the_bench_knows_the_method_and_the_entry(monkeypatch, capsys):
    (entry,) = eval(f"({BENCH_ENTRY})", vars(tables))
    assert entry.name not in tables.ENTRIES
    monkeypatch.setitem(tables.ENTRIES, entry.name, entry)
    exec(compile(METHOD, "saliency.py", "exec"), {"__name__": "fishertune_d2.tuning.saliency"})
    try:
        arguments = ["selection", "--profile", "camvid", "--dry-run", "--methods"]
        assert bench.main([*arguments, "saliency", entry.name]) == 0
    finally:
        TUNING_REGISTRY._obj_map.pop("saliency")
    told = capsys.readouterr().out
    assert "TUNING.METHOD saliency" in told
    assert "TUNING.METHOD fishertune" in told and "TUNING.D_MAX 0.1 " in told
    assert told.endswith("2 cells\n")


def test_the_examples_pass_the_linter(extended):
    files = ["fishertune_d2/tuning/saliency.py", *(file for file, _ in TABLES.values())]
    _call(extended, "-m", "ruff", "check", "--no-cache", *files)
    _call(extended, "-m", "ruff", "format", "--no-cache", "--check", *files)


def test_the_vfm_builds_and_gives_features(monkeypatch):
    ((name, vfm),) = eval(f"{{{VFM_ROW}}}", vars(vfm_table)).items()
    assert name not in VFMS
    public = timm.models.get_pretrained_cfg(vfm.timm_name)
    assert (vfm.source, vfm.licence.lower()) == (public.url, public.license)
    assert (3, vfm.img_size, vfm.img_size) == tuple(public.input_size)

    small = {**vfm.options, "embed_dim": 64, "depth": 6, "num_heads": 2}
    monkeypatch.setitem(VFMS, name, replace(vfm, options=small))
    backbone = VFMBackbone(name=name, weights="random", img_size=(48, 64), patch_size=0)
    maps = backbone(torch.rand(2, 3, 48, 64))
    assert {level: tuple(m.shape) for level, m in maps.items()} == {
        "res2": (2, 64, 12, 16),
        "res3": (2, 64, 6, 8),
        "res4": (2, 64, 3, 4),
        "res5": (2, 64, 2, 2),
    }
    assert all(m.isfinite().all() for m in maps.values())
