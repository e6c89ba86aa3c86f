"""What a run could only fail at later is refused when it starts."""

import pytest

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.stages import units_of
from fishertune_d2.engine.start_check import require_fillable, require_possible, require_scorable
from fishertune_d2.fisher import UNITS, Selection
from fishertune_d2.plan.fake_model import fake_model
from fishertune_d2.tuning import build_tuning_method

from .conftest import train


@pytest.mark.parametrize(
    ("options", "trouble"),
    [
        ({"FISHER__IMS_PER_BATCH": 1}, r"FISHER.IMS_PER_BATCH is 1: .* choose at least 2"),
        ({"FISHER__BATCHES": 0}, "FISHER.BATCHES is 0 .* choose at least 1"),
        ({"FISHER__PERTURB__STRENGTH": 0.0}, "STRENGTH is 0.*TUNING.METHOD fisher"),
        ({"FISHER__PERTURB__POINTS": [0, 4]}, r"POINTS is \[0, 4\]: choose from 0 to 3"),
        ({"FISHER__PERTURB__EPS_MODE": "pixel"}, "EPS_MODE is 'pixel': choose from"),
        ({"FISHER__ESTIMATOR": "exact"}, "FISHER.ESTIMATOR is 'exact': choose from diagonal"),
        ({"SEED": -1}, "SEED is -1: choose at least 0"),
        ({"TUNING__WARMUP_ITERS": 8}, "TUNING.WARMUP_ITERS is 8: choose at least 0"),
        ({"TUNING__METHOD": "sparse"}, "sparse"),
        ({"FISHER__FORM": "eq8"}, "FISHER.FORM is 'eq8': choose from balanced"),
        ({"FISHER__LABELS": "all"}, "FISHER.LABELS is 'all': choose from ground_truth"),
        ({"FISHER__PRECISION": "float16"}, "FISHER.PRECISION is 'float16': choose from float32"),
        ({"TUNING__SCHEDULE": "cosine"}, "TUNING.SCHEDULE.* unknown schedule 'cosine'"),
        ({"TUNING__D_MIN": 0.2}, "TUNING.D_MIN.* need 0 <= d_min <= d_max"),
        ({"TUNING__D_MAX": 1.0}, "chooses among .* tune a share of at most 0.7447"),
        ({"TUNING__METHOD": "random_q", "TUNING__D_MAX": 0.5}, "tune a share of at most 0.0"),
        (
            {"TUNING__METHOD": "random", "TUNING__STEPS": "fisher"},
            "TUNING.METHOD random estimates no Fisher information: set TUNING.STEPS to equal",
        ),
        (
            {"TUNING__UNIT": "neuron", "TUNING__D_MIN": 0.0001, "TUNING__D_MAX": 0.0004},
            "would tune 120 weights in the end, and a neuron has up to 129: raise TUNING.D_MAX",
        ),
        ({"TUNING__UNIT": "row"}, "TUNING.UNIT is 'row': choose from weight, neuron"),
        ({"TUNING__ALLOCATION": "block"}, "TUNING.ALLOCATION is 'block': choose from global, lay"),
        ({"SOLVER__OPTIMIZER": "LION"}, "SOLVER.OPTIMIZER is 'LION': choose from ADAMW, SGD"),
        ({"SOLVER__IMS_PER_BATCH": 0}, "A batch of 0 images"),
        ({"MODEL__SEM_SEG_HEAD__IGNORE_VALUE": 0}, "IGNORE_VALUE is 0: leave it at 255"),
        ({"TEST__CLASS_RULE": "all"}, "TEST.CLASS_RULE is 'all': choose from present, union"),
        ({"DATALOADER__SAMPLER_TRAIN": "Rare"}, "SAMPLER_TRAIN is 'Rare': choose from"),
    ],
    ids=str,
)
def test_a_config_that_cannot_work_is_refused_when_the_trainer_is_built(tiny_cfg, options, trouble):
    with pytest.raises(ValueError, match=trouble):
        Trainer(tiny_cfg(**options))


def test_all_that_is_wrong_is_said_at_once(tiny_cfg):
    with pytest.raises(ValueError, match="FISHER.FORM") as refused:
        require_possible(tiny_cfg(FISHER__FORM="eq8", FISHER__LABELS="all", SEED=-1))
    assert [line.split(" ")[0] for line in str(refused.value).splitlines()] == [
        "SEED",
        "FISHER.FORM",
        "FISHER.LABELS",
    ]


def test_a_batch_that_processes_cannot_share_is_refused(tiny_cfg):
    require_possible(tiny_cfg(SOLVER__IMS_PER_BATCH=6), processes=3)
    with pytest.raises(ValueError, match="A batch of 6 images .* evenly by 4 processes"):
        require_possible(tiny_cfg(SOLVER__IMS_PER_BATCH=6), processes=4)


@pytest.mark.parametrize("method", ["fisher", "childtune"])
def test_a_method_that_needs_no_shift_trains_without_one(tiny_cfg, method):
    keys = {"FISHER__IMS_PER_BATCH": 1, "FISHER__PERTURB__STRENGTH": 0.0, "TUNING__D_MAX": 0.02}
    assert train(tiny_cfg(TUNING__METHOD=method, DATASETS__TEST=(), **keys)).iter == 7


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("method", ["random", "random_v"])
def test_the_share_that_is_named_can_be_filled(method, unit, tiny_cfg):
    keys = {"TUNING__METHOD": method, "TUNING__UNIT": unit}
    cfg = tiny_cfg(TUNING__D_MAX=1.0, **keys)
    backbone, method = fake_model(cfg).backbone, build_tuning_method(cfg)
    with pytest.raises(ValueError, match="at most") as refused:
        require_fillable(cfg, method, backbone)
    share = float(str(refused.value).rpartition(" ")[2])
    require_fillable(tiny_cfg(TUNING__D_MAX=share, **keys), method, backbone)
    with pytest.raises(ValueError, match="at most"):
        require_fillable(tiny_cfg(TUNING__D_MAX=share + 2e-4, **keys), method, backbone)
    scores = method.unit_scores(backbone, None, units := units_of(cfg, method, backbone))
    base = sum(p.numel() for p in backbone.parameters())
    assert Selection.from_scores(scores, share, base, units).share == share
    with pytest.raises(ValueError, match="ask for a smaller share"):
        Selection.from_scores(scores, share + 2e-4, base, units)


def test_neurons_need_a_feed_forward_network_of_two_layers(tiny_cfg):
    cfg = tiny_cfg(TUNING__UNIT="neuron")
    backbone, method = fake_model(cfg).backbone, build_tuning_method(cfg)
    del backbone.vit.blocks[0].mlp.fc2
    with pytest.raises(ValueError, match="TUNING.UNIT neuron: .*fc2.* choose the unit 'weight'"):
        units_of(cfg, method, backbone)


def test_an_estimate_of_another_run_asks_for_no_batches(tiny_cfg):
    require_possible(tiny_cfg(FISHER__IMS_PER_BATCH=1, FISHER__ESTIMATE="f.safetensors"))
    require_possible(tiny_cfg(FISHER__IMS_PER_BATCH=1, TUNING__METHOD="full"))


def test_evaluation_checks_only_what_it_reads(tiny_cfg):
    require_scorable(tiny_cfg(FISHER__FORM="eq8", SEED=-1))
    with pytest.raises(ValueError, match="IGNORE_VALUE"):
        require_scorable(tiny_cfg(MODEL__SEM_SEG_HEAD__IGNORE_VALUE=254))
