"""The configs that read the paper literally, and a run with their keys."""

from pathlib import Path

import pytest
import yaml

from fishertune_d2.config import CONFIGS, read_config
from fishertune_d2.fisher import ESTIMATORS, FisherEstimate, Selection, tuned_share

from .conftest import train

FOLDER = CONFIGS / "paper_literal"
PATHS = sorted(path for path in FOLDER.glob("*.yaml") if not path.name.startswith("Base-"))


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_reads_the_paper_literally(path):
    cfg = read_config(str(path))
    assert (cfg.TUNING.METHOD, cfg.FISHER.ESTIMATOR) == ("fishertune", "variational")
    assert (cfg.FISHER.FORM, cfg.TUNING.SCHEDULE, cfg.FISHER.EPS) == ("eq15", "eq16", 1e-8)
    shares = [
        tuned_share(t, cfg.TUNING.D_MIN, cfg.TUNING.D_MAX, schedule="eq16") for t in (0.0, 1.0)
    ]
    assert shares == pytest.approx([0.01, 0.05], abs=1e-5)
    # Enough batches for steps after the start.
    assert cfg.FISHER.BATCHES >= 4 * 10


def test_the_large_one_tunes_what_the_paper_counts():
    cfg = read_config(str(FOLDER / "fishertune_dinov2.yaml"))
    share = tuned_share(1.0, cfg.TUNING.D_MIN, cfg.TUNING.D_MAX, schedule="eq16")
    assert cfg.MODEL.VFM.NAME == "dinov2_vitl"
    assert share * 304.20 == pytest.approx(15.21, abs=0.005)


def test_a_run_with_its_keys(tiny_cfg):
    keys = yaml.safe_load((FOLDER / "Base-literal.yaml").read_text())
    options = [
        each
        for section, values in keys.items()
        for key, value in values.items()
        for each in (f"{section}.{key}", value)
    ]
    cfg = tiny_cfg("literal", DATASETS__TEST=())
    cfg.merge_from_list([*options, "FISHER.BATCHES", 12, "FISHER.GAMMA", 1e-4])
    train(cfg)
    out = Path(cfg.OUTPUT_DIR)
    estimate = FisherEstimate.load(out / "fisher.safetensors")
    assert estimate.notes["estimator"] == "variational"
    assert estimate.notes["version"] == str(ESTIMATORS["variational"].version)
    assert Selection.load(out / "selection.safetensors").share == pytest.approx(0.05, rel=0.3)
