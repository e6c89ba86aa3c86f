"""What the heads of the configs say that they cost."""

import re
from pathlib import Path

import pytest

from fishertune_d2.config import read_config
from fishertune_d2.engine.parameter_counts import count_parameters
from fishertune_d2.plan import make_plan, summary

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
# <method>_<vfm>, those of the paper's Table 1; others name one of them, or are for a CPU.
PATHS = sorted(CONFIGS.glob("*_*.yaml"))


def _costs(path: Path) -> str:
    head = re.search(r"^# Costs, .*?(?=^# Expected)", path.read_text(), re.M | re.S)
    assert head, f"{path.name} does not say what it costs: run tools/config_costs.py"
    return " ".join(line.removeprefix("#").strip() for line in head[0].splitlines())


def test_costs_are_those_of_the_plan():
    path = CONFIGS / "fishertune_dinov2.yaml"  # each takes seconds; they are written together
    without_tests = ["DATASETS.TEST", "()"]  # the heads leave out inference
    plan_of_config = make_plan(read_config(str(path), without_tests))
    assert _costs(path) == summary(plan_of_config), "run tools/config_costs.py"


def test_new_costs_replace_the_old_ones_alone(monkeypatch):
    monkeypatch.syspath_prepend(CONFIGS.parent / "tools")
    from config_costs import rewrite

    text = (CONFIGS / "soma_dinov2.yaml").read_text()
    assert "# Learning rate: " in text
    changed = rewrite(text, "Costs, with 1 image: 2 TFLOP.")
    old = re.search(r"^# Costs, .*?(?=^# Learning)", text, re.M | re.S)[0]
    assert changed == text.replace(old, "# Costs, with 1 image: 2 TFLOP.\n")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_costs_are_stated_for_the_batch_and_the_size_of_the_config(path):
    cfg, costs = read_config(str(path)), _costs(path)
    height, width = cfg.INPUT.CROP.SIZE
    assert f"with {cfg.SOLVER.IMS_PER_BATCH} images of {width} x {height}: " in costs
    stages = {"tuning"}
    stages |= {"warm-up"} if cfg.TUNING.WARMUP_ITERS else set()
    stages |= {"estimation"} if cfg.TUNING.METHOD == "fishertune" else set()
    assert set(re.findall(r"in (warm-up|estimation|tuning)", costs)) == stages


def test_full_costs_more_than_fishertune_and_freeze_less():
    def tuning(method: str, vfm: str) -> tuple[float, float]:
        costs = _costs(CONFIGS / f"{method}_{vfm}.yaml")
        flops, memory = (
            re.search(p, costs)[1] for p in (r": ([\d.]+) TFLOP", r"([\d.]+) in tuning")
        )
        return float(flops), float(memory)

    for vfm in sorted(path.stem.removeprefix("full_") for path in CONFIGS.glob("full_*.yaml")):
        freeze, selected, full = (
            tuning(method, vfm) for method in ("freeze", "fishertune", "full")
        )
        assert all(a < b < c for a, b, c in zip(freeze, selected, full, strict=True))


@pytest.mark.parametrize(
    "path", [path for path in PATHS if "\n# Adds: " in path.read_text()], ids=lambda path: path.stem
)
def test_says_how_many_weights_are_added(path):
    counts = count_parameters(read_config(str(path)))
    added, own = (counts[f"{key}_parameters"] / 1e6 for key in ("tuned", "backbone"))
    assert f"\n# Adds: {added:.2f} M to {own:.2f} M backbone weights.\n" in path.read_text()
