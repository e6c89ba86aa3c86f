"""The hours of a table, summed up by a dry run."""

from collections import Counter

import pytest

from fishertune_d2.bench import hours
from fishertune_d2.bench.tables import PROFILES
from fishertune_d2.config import read_config
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.plan import Plan, Stage
from fishertune_d2.plan.fake_run import stage_lengths
from fishertune_d2.plan.flops import Flops
from fishertune_d2.plan.inference import Inference
from fishertune_d2.plan.memory import Memory
from fishertune_d2.tuning import build_tuning_method


def test_a_dry_run_sums_up_the_hours_of_cells_that_are_not_done(runs, capsys, monkeypatch):
    planned = []

    def plan(cfg):  # a step of 2 TFLOP and an image of 0.5, whatever the model
        method = build_tuning_method(cfg)
        planned.append((cfg.TUNING.METHOD, bool(cfg.TUNING.WARMUP_CHECKPOINT), cfg.DATASETS.TEST))
        lengths = stage_lengths(cfg, method).items()
        stages = [Stage(n, k, 2, 2 * 10**12, Counter(), Memory()) for n, (k, _) in lengths]
        image = Flops(5 * 10**11, 0, Counter())
        tested = [Inference(cfg.DATASETS.TEST, None, (8, 8), 1, image)]
        return Plan("", "", "cpu", (8, 8), {}, stages, tested, 1, {}, 0)

    monkeypatch.setattr(hours, "make_plan", plan)
    table = ("selection", "--methods", "freeze", "random", "--seeds", "42", "43")
    asked = ("--dry-run", "--tflops", "0.1")
    assert runs(*table, *asked) == 0
    said = capsys.readouterr().out
    cfg, sets = read_config("camvid/freeze.yaml"), PROFILES["camvid"].dev
    images = sum(d.published.pairs for d in DATASETS if d.name in sets)
    scoring = 0.5 * images / 0.1
    both, tuned = (
        2 * n / 0.1 + scoring
        for n in (cfg.SOLVER.MAX_ITER, cfg.SOLVER.MAX_ITER - cfg.TUNING.WARMUP_ITERS)
    )
    lines = [line.split() for line in said.splitlines()]
    assert ["dinov2_vits", "freeze", "2", f"{2 * both / 3600:.2f}"] in lines
    assert ["dinov2_vits", "random", "2", f"{2 * tuned / 3600:.2f}"] in lines
    assert ["all", "4", f"{2 * (both + tuned) / 3600:.2f}"] in lines
    assert planned == [("freeze", False, sets), ("random", True, sets)]  # one for both seeds

    assert runs(*table, *asked, "--test") == 0  # scoring alone
    tested = PROFILES["camvid"].test["test"]
    scoring = 4 * 0.5 * sum(d.published.pairs for d in DATASETS if d.name in tested) / 0.1
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["all", "4", f"{scoring / 3600:.2f}"] in lines

    assert runs(*table[:-1]) == 0  # the first seed
    capsys.readouterr()
    assert runs(*table, *asked) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["all", "2", f"{(both + tuned) / 3600:.2f}"] in lines

    assert runs(*table, "--dry-run", "--card", "a40") == 0
    assert "149.7 in bfloat16" in capsys.readouterr().out


def test_hours_are_those_of_a_dry_run(runs, capsys):
    with pytest.raises(SystemExit):
        runs("selection", "--card", "h100")
    assert "say the hours of a dry run: add --dry-run" in capsys.readouterr().err
    assert not runs.calls()
