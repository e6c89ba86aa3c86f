"""The benchmark of how much two selections have in common, on small numbers."""

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from PIL import Image

from fishertune_d2.data import register_sem_seg
from fishertune_d2.fisher import FisherEstimate

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "blocks.0.mlp.fc1.weight": (60, 8),
    "blocks.0.mlp.fc1.bias": (60,),
    "blocks.0.mlp.fc2.weight": (8, 60),
    "blocks.0.mlp.fc2.bias": (8,),
}
SETTING = SimpleNamespace(base=1028)  # all of them


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("selection_stability")


def _estimate(seed: int) -> FisherEstimate:
    generator = torch.Generator().manual_seed(seed)
    f, shifted = (
        {name: torch.rand(shape, generator=generator) for name, shape in SHAPES.items()}
        for _ in "ab"
    )
    return FisherEstimate(f, shifted, 0.3, 4)


def test_an_estimate_has_all_in_common_with_itself_and_little_with_another(benchmark):
    allocations = ["global", "layer"]
    same = benchmark.in_common(SETTING, [_estimate(0), _estimate(0)], allocations)
    assert len(same) == 2 * 4 * 2  # units, scores, allocations
    assert all(row["overlap"] == 1.0 for row in same)
    other = benchmark.in_common(SETTING, [_estimate(0), _estimate(1)], ["global"])
    by_chance = [row["overlap"] for row in other if row["unit"] == "weight"]
    assert all(each < 0.25 for each in by_chance)


def test_halves_are_disjoint_and_cover_a_data_set(benchmark, tmp_path):
    for i in range(40):
        for folder in ("images", "labels"):
            (tmp_path / folder).mkdir(exist_ok=True)
            image = np.zeros((2, 2, 3)[: 3 if folder == "images" else 2], np.uint8)
            Image.fromarray(image).save(tmp_path / folder / f"{i}.png")
    register_sem_seg("forty", tmp_path / "images", tmp_path / "labels", ["road"])
    halves = [benchmark.register_half("forty", half, 43) for half in (0, 1)]
    whole, *both = (
        {sample["file_name"] for sample in DatasetCatalog.get(name)} for name in ("forty", *halves)
    )
    assert not both[0] & both[1]
    assert both[0] | both[1] == whole
    assert all(len(half) > 10 for half in both)
    other = benchmark.register_half("forty", 0, 44)
    assert {sample["file_name"] for sample in DatasetCatalog.get(other)} != both[0]


def test_the_table_has_the_mean_over_seeds(benchmark, capsys):
    tables = importlib.import_module("fisher_tables")
    row = {"estimator": "diagonal", "unit": "neuron", "rho": 0.01, "allocation": "layer"}
    rows = [
        {"seed": 43 + i, **row, "images": [16, 32], "overlap": overlap}
        for i, overlap in enumerate([[0.2, 0.4], [0.4, 0.5]])
    ]
    tables._stability({"rows": rows})
    line = capsys.readouterr().out.splitlines()[2]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells == ["diagonal", "neuron", "layer", "DRF, rho 0.01", "0.300", "0.450"]


def test_the_page_has_the_committed_numbers(benchmark, capsys):
    tables = importlib.import_module("fisher_tables")
    measured = json.loads((ROOT / "docs/results/fisher/stability.json").read_text())
    tables._stability(measured)
    assert capsys.readouterr().out.strip() in (ROOT / "docs/results/fisher.md").read_text()
    names = {name for _, reads in benchmark.PASSES.values() for name in reads}
    assert {row["estimator"] for row in measured["rows"]} <= names
    assert all(tuple(row["images"]) == benchmark.MARKS for row in measured["rows"])
