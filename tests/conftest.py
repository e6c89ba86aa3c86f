"""Fixtures that several tests share."""

import os
from pathlib import Path

import pytest
import torch


@pytest.fixture
def shared_dir() -> Path:
    """The folder with real data (``datasets/CamVid``) and weights; skips the test without it."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("FISHERTUNE_SHARED", default))
    if not (folder / "datasets").is_dir():
        pytest.skip(f"needs real data and weights: no such folder {folder} (FISHERTUNE_SHARED)")
    return folder


@pytest.fixture
def one_thread():
    """Threads cost more than they save on tensors this small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
