"""The benchmark of several processes, without its measurements."""

import importlib
from pathlib import Path

import pytest
import torch
from timm.models import VisionTransformer

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("scaling")


def test_each_cell_tunes_its_share(benchmark):
    shares = {}
    for cell in benchmark.CELLS:
        if cell.way != benchmark.FISHERTUNE:
            assert cell.way == benchmark.ESTIMATION or cell.tune
            continue
        vit = VisionTransformer(img_size=28, patch_size=14, embed_dim=24, depth=2, num_heads=2)
        total = sum(p.numel() for p in vit.parameters())
        tuned = sum(p.numel() for p in cell.tune(cell.config(), vit))
        shares[cell.share] = tuned / total
    assert shares == pytest.approx({0.01: 0.01, 0.05: 0.05, 0.2: 0.2}, abs=1e-3)


def test_a_cell_makes_a_step(benchmark):
    cell = benchmark.Cell(benchmark.FISHERTUNE, crop=(28, 42))
    training = benchmark.Training(cell.config(), cell.tune)
    before = [p.detach().clone() for p in training.tuned]
    training.step()
    assert any(not torch.equal(a, b) for a, b in zip(before, training.tuned, strict=True))
