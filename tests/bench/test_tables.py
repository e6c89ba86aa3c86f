"""Every table can be planned in every profile, from the configs as they are."""

import json
from functools import partial
from pathlib import Path

import pytest
from detectron2.modeling import build_backbone

from fishertune_d2.bench.cells import ESTIMATE, WARMUP, make_cells, makers
from fishertune_d2.bench.request import Request
from fishertune_d2.bench.tables import FREEZE, PROFILES, TABLES, find_entry
from fishertune_d2.config import read_config
from fishertune_d2.engine.parameter_counts import build_empty
from fishertune_d2.fisher import ESTIMATORS, count_of_share, find_candidates
from fishertune_d2.tuning import TUNING_REGISTRY

ROOT = Path(__file__).resolve().parents[2]


def _plan(
    tmp_path,
    names=None,
    table="selection",
    profile="camvid",
    vfms=("dinov2_vits",),
    seeds=(1,),
    rates=None,
    options=(),
):
    entries = [find_entry(name) for name in names or TABLES[table].entries]
    entries = [entry for entry in entries if entry.method in TUNING_REGISTRY]
    output = tmp_path / "out"
    request = Request(table, TABLES[table], profile, entries, vfms, seeds, output, options)
    return make_cells(request, rates or {})


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("name", TABLES)
def test_every_table_has_its_configs(name, profile, tmp_path):
    table = TABLES[name]
    vfms = PROFILES[profile].vfms or table.vfms
    cells = _plan(tmp_path, table=name, profile=profile, vfms=vfms)
    assert len(cells) >= 3 * len(vfms)
    for cell in cells:
        assert cell.recipe["MODEL.VFM.NAME"] == cell.vfm and cell.recipe["SEED"] == 1
        assert cell.recipe["TUNING.METHOD"] == cell.entry.method
        trained = f"{profile.removesuffix('_long')}_day_train"
        if profile == "paper":
            trained = "cityscapes_train" if table.source else "gtav_train"
        assert list(cell.recipe["DATASETS.TRAIN"]) == [trained]
    # Each file is made once, by a cell that stands before those who take it.
    made = [cell.shared[what] for cell in cells for what in cell.makes]
    assert len(set(made)) == len(made)
    taken_from, before = makers(cells), set()
    for cell in cells:
        makers_of_it = taken_from[cell.folder]
        assert makers_of_it <= before and bool(makers_of_it) == bool(cell.takes)
        before.add(cell.folder)


def test_which_entries_share_an_estimate(tmp_path):
    cells = {cell.entry.name: cell for cell in _plan(tmp_path)}
    of = {name: cell.shared.get(ESTIMATE) for name, cell in cells.items()}
    plain = ("fishertune", "fisher", "delta_fisher", "eq7", "eq15", "rank", "share_1", "share_20")
    assert len({of[name] for name in plain}) == 1
    assert of["fisher_variational"] == of["variational"]
    others = ("smoothed", "natural", "variational", "sampled_labels", "shift_embedding")
    assert len({of[name] for name in ("fishertune", *others, "shift_blocks")}) == 7
    assert of[FREEZE] is of["full"] is of["random_q"] is None
    assert len({cell.shared[WARMUP] for cell in cells.values()}) == 1
    assert cells[FREEZE].makes == {WARMUP} and cells["fishertune"].makes == {ESTIMATE}


def test_an_estimate_of_another_version_of_its_estimator_is_another_file(tmp_path, monkeypatch):
    def paths():
        cells = {cell.entry.name: cell for cell in _plan(tmp_path)}
        return [cells[name].shared[ESTIMATE] for name in ("fishertune", "variational")]

    plain, variational = paths()
    monkeypatch.setattr(ESTIMATORS["variational"], "version", 3)
    assert paths()[0] == plain and paths()[1] != variational


@pytest.mark.parametrize("profile", ["camvid", "paper"])
def test_methods_without_a_warmup_train_without_unless_it_is_asked_for(profile, tmp_path):
    names = ["rein", "set", "rein_fp", "vpt"]
    plan = partial(_plan, tmp_path, names, table="table1", profile=profile)
    warmups = {cell.entry.name: cell.recipe["TUNING.WARMUP_ITERS"] for cell in plan()}
    assert warmups.pop("vpt") > 0 and warmups == dict.fromkeys(names[:3], 0)
    asked = plan(options=("TUNING.WARMUP_ITERS", "7"))
    assert {cell.recipe["TUNING.WARMUP_ITERS"] for cell in asked} == {7}


def test_nothing_is_shared_between_seeds_and_models_or_without_a_warm_up(tmp_path):
    cells = _plan(tmp_path, [FREEZE, "full"], vfms=("dinov2_vits", "tiny"), seeds=(1, 2))
    assert len({cell.shared[WARMUP] for cell in cells}) == 4
    (cell,) = _plan(tmp_path, [FREEZE], options=["TUNING.WARMUP_ITERS", "0"])
    assert cell.shared == {}


def test_rates_are_cells_of_their_own_that_share_the_rest(tmp_path):
    rates = {("dinov2_vits", "fishertune"): (0.3, 3.0)}
    cells = _plan(tmp_path, [FREEZE, "fishertune", "share_20"], rates=rates)
    assert [cell.folder.name for cell in cells] == [
        *("freeze_1", "fishertune@rate=0.3_1", "fishertune@rate=3_1"),
        *("share_20@rate=0.3_1", "share_20@rate=3_1"),  # a variant takes its method's
    ]
    assert [cell.recipe["SOLVER.BACKBONE_MULTIPLIER"] for cell in cells[1:]] == [0.3, 3.0] * 2
    assert len({cell.shared[ESTIMATE] for cell in cells[1:]}) == 1


def test_the_papers_cells_from_cityscapes_are_trained_once(tmp_path):
    folders = [
        {
            cell.folder
            for cell in _plan(tmp_path, table=name, profile="paper", vfms=TABLES[name].vfms)
        }
        for name in ("table2", "table3")
    ]
    assert folders[1] < folders[0]


def test_the_recipe_is_what_a_json_file_holds(tmp_path):
    (cell,) = _plan(tmp_path, ["full"])
    assert json.loads(json.dumps(cell.recipe)) == cell.recipe


@pytest.mark.parametrize("config", ["camvid/freeze", "freeze_dinov2", "freeze_eva02"])
def test_each_group_of_fig_3_holds_the_share_that_is_tuned(config):
    backbone = build_empty(read_config(str(ROOT / f"configs/{config}.yaml")), build_backbone)
    blocks = 1 + max(candidate.block for candidate in find_candidates(backbone))
    base = sum(p.numel() for p in backbone.parameters())
    for kind in ("Q", "K", "V", "FFN"):
        sizes = [c.numel for c in find_candidates(backbone) if c.kind == kind]
        assert count_of_share(0.025, base) <= sum(sizes) * (blocks // 3) // blocks
