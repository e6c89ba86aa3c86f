"""The wheel, installed into an empty folder: configs, training and bench outside a checkout."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from importlib.metadata import PathDistribution
from pathlib import Path

import numpy as np
import pytest
from packaging.requirements import Requirement
from PIL import Image

from fishertune_d2 import doctor

ROOT = Path(__file__).resolve().parents[1]
TINY = (
    "MODEL.VFM.WEIGHTS random MODEL.VFM.PATCH_SIZE 16 MODEL.SEM_SEG_HEAD.CONVS_DIM 32 "
    "MODEL.SEM_SEG_HEAD.MASK_DIM 32 MODEL.MASK_FORMER.HIDDEN_DIM 32 "
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS 64 INPUT.CROP.SIZE [48,64] INPUT.MIN_SIZE_TRAIN [48] "
    "SOLVER.MAX_ITER 2 SOLVER.IMS_PER_BATCH 2 TUNING.WARMUP_ITERS 1 FISHER.BATCHES 1 "
    "FISHER.IMS_PER_BATCH 2 TEST.PICTURES 0"
).split()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy: setuptools leaves build/ beside setup.py."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("fishertune_d2", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    _pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder))
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory) -> Path:
    """A folder that holds what the wheel installs, and nothing else."""
    folder = tmp_path_factory.mktemp("site")
    _pip("install", "--no-deps", "--target", str(folder), str(wheel))
    return folder


def _pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture
def python(site, tmp_path) -> Callable[..., str]:
    """Runs Python away from the checkout, with the wheel's copy in front of any other."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        "PYTHONSAFEPATH": "1",
        "DETECTRON2_DATASETS": str(tmp_path / "datasets"),
        "FISHERTUNE_CACHE": str(tmp_path / "cache"),
        "OMP_NUM_THREADS": "1",
    }

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments]
        end = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert end.returncode == 0, end.stdout[-2000:] + end.stderr[-2000:]
        return end.stdout

    return run


def test_holds_every_config_and_the_papers_numbers_and_no_test(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    configs = {f"fishertune_d2/{path.relative_to(ROOT)}" for path in ROOT.glob("configs/**/*.yaml")}
    assert len(configs) > 40
    assert {name for name in names if name.endswith(".yaml")} == configs
    assert "fishertune_d2/bench/paper.csv" in names
    assert "fishertune_d2/py.typed" in names  # type checkers read our annotations
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fishertune_d2"}
    assert not [name for name in names if "test" in name]


def test_reads_and_plans_a_config_by_its_name(python, site):
    code = (
        "import fishertune_d2\n"
        "from fishertune_d2.plan.__main__ import main\n"
        "print(fishertune_d2.__file__)\n"
        "print(fishertune_d2.get_config_file('camvid/freeze.yaml'))\n"
        "main(['--config-file', 'camvid/freeze.yaml', 'MODEL.VFM.NAME', 'tiny'])"
    )
    package, config, *plan = python("-c", code).splitlines()
    assert package == str(site / "fishertune_d2/__init__.py")
    assert config == str(site / "fishertune_d2/configs/camvid/freeze.yaml")
    assert "280 x 210" in "".join(plan)  # of the file's _BASE_


def test_the_bench_trains(python, site, tmp_path):
    rng = np.random.default_rng(0)
    for split, stem in (("train", "0006R0_1"), ("train", "0001TP_1"), ("val", "0016E5_1")):
        for folder, size in ((split, (48, 64, 3)), (f"{split}annot", (48, 64))):
            file = tmp_path / "datasets/CamVid" / folder / f"{stem}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 11, size, dtype=np.uint8)).save(file)
    command = ["selection", "--profile", "camvid", "--vfm", "tiny", "--methods", "fishertune"]
    python("-m", "fishertune_d2.bench", *command, "--output", "out", "--set", *TINY)
    cell = json.loads((tmp_path / "out/tiny/fishertune_42/cell.json").read_text())
    assert str(site / "fishertune_d2/configs/camvid/fishertune.yaml") in cell["command"]
    results = json.loads((tmp_path / "out/tiny/fishertune_42/results.json").read_text())
    assert list(results["targets"]) == ["camvid_dusk_dev"]
    assert results["protocol"]["commit"] is None


def test_asks_for_what_the_doctor_reads_in_the_checkout(site):
    (folder,) = site.glob("*.dist-info")
    about = PathDistribution(folder).metadata
    python, needs = doctor._needs()
    assert python == about["Requires-Python"]
    installed = {str(Requirement(line)) for line in about.get_all("Requires-Dist")}
    assert {str(Requirement(line)) for line in needs} == installed
