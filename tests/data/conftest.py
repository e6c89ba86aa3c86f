"""A small data set on disk, for the tests of reading, checking and loading; a fresh process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fishertune_d2

# Imports the package without data, twice, then runs the check as ``python -m`` does.
_FRESH = """
import importlib, os, runpy, sys
from detectron2.data import DatasetCatalog
import fishertune_d2.data.registration as registration
importlib.reload(registration)
names = {dataset.name for dataset in registration.DATASETS}
print("all registered:", names <= set(DatasetCatalog.list()))
from fishertune_d2.data.labels import LABEL_MAPS
print(*LABEL_MAPS["identity_3_ignore_1"][[0, 1, 2, 3, 255]])
print(*LABEL_MAPS["identity_255_ignore_7"][[0, 7, 254, 255]])
os.environ["DETECTRON2_DATASETS"] = sys.argv[1]
sys.argv = ["check", "gtav_train"]
runpy.run_module("fishertune_d2.data.check", run_name="__main__", alter_sys=True)
"""


@pytest.fixture(scope="session")
def fresh_process(tmp_path_factory: pytest.TempPathFactory) -> subprocess.CompletedProcess[str]:
    """A process of its own, for tests of the first import: one for all, as it takes seconds."""
    data = tmp_path_factory.mktemp("fresh")
    for folder in ("images", "labels"):
        (data / "gta" / folder).mkdir(parents=True)
        Image.new("RGB" if folder == "images" else "L", (4, 3)).save(data / f"gta/{folder}/0.png")
    environment = {
        **os.environ,
        "DETECTRON2_DATASETS": "/nowhere/at/all",
        "FISHERTUNE_CACHE": str(data / "cache"),
    }
    return subprocess.run(
        [sys.executable, "-c", _FRESH, str(data)],
        capture_output=True,
        text=True,
        cwd=Path(fishertune_d2.__file__).parents[1],
        env=environment,
    )


@pytest.fixture
def camvid_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Returns a function that writes a fake CamVid train folder and points Detectron2 to it."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))

    def write(
        stems: tuple[str, ...] = ("a", "b", "0001TP_c"),
        image_suffix: str = ".jpg",
        size: tuple[int, int] = (12, 16),
    ) -> Path:
        images, labels = tmp_path / "CamVid/train", tmp_path / "CamVid/trainannot"
        rng = np.random.default_rng(0)
        for stem in stems:
            for folder in (images, labels):
                (folder / stem).parent.mkdir(parents=True, exist_ok=True)
            pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(images / f"{stem}{image_suffix}")
            ids = rng.integers(0, 12, size, dtype=np.uint8)
            Image.fromarray(ids).save(labels / f"{stem}.png")
        return tmp_path / "CamVid"

    return write
