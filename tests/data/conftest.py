"""A small data set on disk, for the tests of reading, checking and loading."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


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
