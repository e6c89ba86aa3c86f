"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest


@pytest.fixture
def shared_dir() -> Path:
    """The folder with real data (``datasets/CamVid``) and weights; skips the test without it."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("FISHERTUNE_SHARED", default))
    if not (folder / "datasets").is_dir():
        pytest.skip(f"needs real data and weights: no such folder {folder} (FISHERTUNE_SHARED)")
    return folder
