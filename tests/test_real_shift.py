"""The benchmark of the simulated shift against the real one, on a tiny model and a fake CamVid."""

import importlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from camvid_runs import TINY_CAMVID, write_camvid

from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer
from fishertune_d2.fisher import FisherEstimate

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "blocks.0.mlp.fc1.weight": (60, 8),
    "blocks.0.mlp.fc1.bias": (60,),
    "blocks.0.mlp.fc2.weight": (8, 60),
    "blocks.0.mlp.fc2.bias": (8,),
}
IMAGES = 4


@pytest.fixture
def benchmark(monkeypatch, one_thread) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    module = importlib.import_module("real_shift")
    monkeypatch.setattr(module, "IMAGES", IMAGES)
    monkeypatch.setattr(module, "BATCH", 2)
    return module


@pytest.fixture
def options(tmp_path, monkeypatch) -> list[str]:
    """Keys and values of a tiny model, with twelve images by day and two at dusk."""
    folder = write_camvid(tmp_path) / "CamVid"
    for part in ("train", "trainannot"):
        for i in range(3, 13):
            shutil.copy(folder / part / "0006R0_1.png", folder / part / f"0006R0_{i}.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    return [*TINY_CAMVID, "FISHER.BATCHES", "2", "SEED", "43"]


@pytest.fixture
def setting(benchmark, options, tmp_path):
    return benchmark.Setting("camvid/fishertune.yaml", options, tmp_path / "out")


@pytest.fixture
def training(options, tmp_path) -> Callable[..., Trainer]:
    """Returns a function that starts the training whose estimate the benchmark repeats."""

    def start(*others: str) -> Trainer:
        cfg = default_config()
        cfg.merge_from_file(str(ROOT / "configs/camvid/fishertune.yaml"))
        cfg.merge_from_list([*options, "OUTPUT_DIR", str(tmp_path / "run"), *others])
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=False)
        return trainer

    return start


def _same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_the_day_and_eq_6_are_what_a_training_measures(benchmark, setting, training):
    trainer = training()
    estimate = trainer._estimate()
    measured = {
        name: benchmark.measure(setting, benchmark.DOMAINS[name]) for name in ("day", "Eq. 6, 1")
    }
    assert _same(measured["day"].f, estimate.f)
    assert _same(measured["Eq. 6, 1"].f, estimate.shifted)
    assert not _same(estimate.f, estimate.shifted)
    assert measured["day"].images == estimate.images == IMAGES


def test_each_domain_has_its_own_images(benchmark, setting):
    whole = setting.cfg.DATASETS.TRAIN
    setting.cfg.defrost()

    def crops(name: str) -> list[dict]:
        domain = benchmark.DOMAINS[name]
        setting.cfg.DATASETS.TRAIN = (benchmark.dataset_of(domain, *whole, 43),)
        stream = setting.batches(IMAGES, skip=domain.part * IMAGES)
        return [crop for batch in stream for crop in batch]

    found = {name: crops(name) for name in ("day", "other day", "third day", "night", "dusk")}
    files = {name: {Path(c["file_name"]).stem for c in each} for name, each in found.items()}
    days = [files["day"], files["other day"], files["third day"]]
    assert len(set.union(*days)) == 3 * IMAGES  # no image twice
    assert files["dusk"] == {"0001TP_1", "0001TP_2"}
    pairs = list(zip(found["day"], found["night"], strict=True))
    assert all(torch.equal(day["sem_seg"], night["sem_seg"]) for day, night in pairs)
    light = [sum(c["image"].float().mean() for c in found[name]) for name in ("day", "night")]
    assert light[1] < 0.8 * light[0]


def test_a_shift_like_the_real_one_finds_its_neurons_and_another_does_not(benchmark):
    generator = torch.Generator().manual_seed(0)

    def noisy() -> dict[str, torch.Tensor]:
        return {name: 1 + 0.01 * torch.rand(s, generator=generator) for name, s in SHAPES.items()}

    def raised(neurons: slice) -> dict[str, torch.Tensor]:
        f = noisy()
        for name, value in f.items():
            (value if "fc1" in name else value.mT if value.dim() == 2 else value[:0])[neurons] *= 9
        return f

    f = {name: noisy() for name in benchmark.DOMAINS}
    f |= {name: raised(slice(3)) for name in f if name.startswith("dusk")}
    f |= {"Eq. 6, 1": raised(slice(3)), "night": raised(slice(20, 23))}
    f |= {"third day": raised(slice(40, 43))}
    setting = SimpleNamespace(base=1028, cfg=SimpleNamespace(SEED=43))  # three neurons are 5 %
    rows = [row for row in benchmark.compare(setting, f) if row["x"] == "other"]
    assert {row["unit"] for row in rows} == {"weight", "neuron"}
    overlaps = {
        name: [r["overlap"] for r in rows if r["shift"] == name]
        for name in ("Eq. 6, 1", "real, other half", "night", "no shift")
    }
    assert all(len(each) == 2 * len(benchmark.SCORES) for each in overlaps.values())
    assert min(overlaps["Eq. 6, 1"] + overlaps["real, other half"]) == 1.0
    assert max(overlaps["night"] + overlaps["no shift"]) < 0.1


def test_a_training_takes_the_estimate_of_the_real_shift(benchmark, setting, training, tmp_path):
    names = ["day", "dusk", "night"]
    f = benchmark.measured(setting, names, tmp_path / "kept")
    assert _same(benchmark.measured(None, names, tmp_path / "kept")["dusk"], f["dusk"])
    benchmark.save_estimates(setting, f, "night", tmp_path)
    file = tmp_path / "real_dusk_43.safetensors"
    trainer = training("FISHER.ESTIMATE", str(file))
    assert _same(trainer._estimate().shifted, f["dusk"])
    assert _same(FisherEstimate.load(tmp_path / "photometric_43.safetensors").shifted, f["night"])
    with pytest.raises(ValueError, match="SEED was 43 and is 44"):
        training("FISHER.ESTIMATE", str(file), "SEED", "44")
    with pytest.raises(ValueError, match="FISHER.BATCHES was 2 and is 3"):
        training("FISHER.ESTIMATE", str(file), "FISHER.BATCHES", "3")


def test_the_page_has_the_committed_numbers(benchmark, capsys):
    tables = importlib.import_module("fisher_tables")
    measured = json.loads((ROOT / "docs/results/fisher/real_shift.json").read_text())
    tables._real_shift(measured)
    page = (ROOT / "docs/results/fisher.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
