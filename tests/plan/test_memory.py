"""Bytes against what real models, optimizers and estimators hold."""

import pytest
import torch

from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.engine.perturbation import build_perturbation
from fishertune_d2.fisher import ESTIMATORS, STEPS, UNITS, estimate_fisher, find_candidates
from fishertune_d2.plan.fake_run import FakeRun
from fishertune_d2.plan.memory import estimator_bytes, held_bytes, saved_bytes
from fishertune_d2.plan.stage_costs import activation_bytes, held_memory
from fishertune_d2.tuning import build_tuning_method


def _planned(cfg, *stages: str, size=(48, 64)) -> dict[str, int]:
    """The bytes of some stages; of all that the run has by default."""
    run = FakeRun(cfg, build_tuning_method(cfg), size)
    return {name: activation_bytes(run, name) for name in stages or run.stages}


@pytest.mark.parametrize("method", ["fishertune", "full", "freeze"])
def test_activations_are_those_of_a_real_graph(small_cfg, real_model, real_batch, method):
    cfg = small_cfg(TUNING__METHOD=method, FISHER__ESTIMATE="another_run.safetensors")
    planned = _planned(cfg)
    for stage in ("warmup", "tuning"):
        model = real_model(cfg, stage)
        assert planned[stage] == saved_bytes(model, lambda model=model: model(real_batch(2)))
    assert (planned["warmup"] < planned["tuning"]) == (method != "freeze")


def test_neurons_keep_less_of_the_inputs(small_cfg, real_model, real_batch):
    kept = {}
    for unit in ("weight", "neuron"):
        cfg = small_cfg(TUNING__UNIT=unit, FISHER__ESTIMATE="another_run.safetensors")
        kept[unit] = _planned(cfg, "tuning")["tuning"]
        model = real_model(cfg, "tuning")
        real = saved_bytes(model, lambda model=model: model(real_batch(2)))
        assert kept[unit] == pytest.approx(real, rel=0.005)
    assert kept["neuron"] < kept["weight"]


@pytest.mark.parametrize("unit", UNITS)
def test_factors_on_steps_are_counted(small_cfg, unit):
    held = {}
    for steps in STEPS:
        cfg = small_cfg(TUNING__UNIT=unit, TUNING__STEPS=steps)
        run = FakeRun(cfg, build_tuning_method(cfg), (48, 64))
        held[steps] = held_memory(run, "tuning").selection
        activation_bytes(run, "tuning")
    selection = run.selection(run.model("tuning"))
    slices = sum(len(selection.slices(name).index) for name in selection.shapes)
    assert held["fisher"] - held["equal"] == 4 * slices  # one float32 each


def test_activations_of_perturbed_features(small_cfg, real_model, real_batch):
    options = {"TUNING__METHOD": "full", "TUNING__WARMUP_ITERS": 0}
    cfg = small_cfg(**options, TUNING__FEATURE_PERTURBATION=True)
    model = real_model(cfg, "tuning")
    with build_perturbation(cfg, model.backbone).drawing():
        real = saved_bytes(model, lambda: model(real_batch(2)))
    assert _planned(cfg)["tuning"] == real > _planned(small_cfg(**options))["tuning"]


@pytest.mark.parametrize(
    ("labels", "precision"),
    [("ground_truth", "float32"), ("ground_truth", "bfloat16"), ("sampled", "float32")],
)
def test_activations_of_the_estimate_too(small_cfg, real_model, real_batch, labels, precision):
    cfg = small_cfg(FISHER__LABELS=labels, FISHER__PRECISION=precision, FISHER__IMS_PER_BATCH=3)
    model = real_model(cfg, "warmup")
    for candidate in find_candidates(model.backbone):
        candidate.parameter.requires_grad_(True)
    loss = SegmentationLoss() if labels == "ground_truth" else SegmentationLoss().sampled
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16")
    with build_perturbation(cfg, model.backbone).drawing(), autocast:
        real = saved_bytes(model, lambda: loss(model, real_batch(3)))
    assert _planned(cfg, "estimation")["estimation"] == pytest.approx(real, rel=1e-3)


def test_a_gpu_is_planned_where_there_is_none(small_cfg):
    large = {"size": (384, 512)}  # the weights' halves are kept too, and count for little here
    cpu = _planned(small_cfg(), **large)
    gpu = _planned(small_cfg(MODEL__DEVICE="cuda"), **large)
    half = _planned(
        small_cfg(MODEL__DEVICE="cuda", SOLVER__AMP__ENABLED=True), "estimation", "tuning", **large
    )
    assert not torch.is_autocast_enabled("cuda")
    for stage in cpu:
        # The logarithms that attention keeps are padded on a GPU.
        assert gpu[stage] == pytest.approx(cpu[stage], rel=0.01)
    # FISHER.PRECISION is float32 in all three; the pixel decoder and the losses always are.
    assert half["estimation"] == gpu["estimation"]
    assert 0.5 < half["tuning"] / gpu["tuning"] < 0.9


def test_one_image_at_a_time_keeps_the_graph_of_one(small_cfg):
    batch, loop = (
        _planned(small_cfg(FISHER__ESTIMATOR=e), "estimation", "tuning")
        for e in ("diagonal", "diagonal_loop")
    )
    assert loop["estimation"] == pytest.approx(batch["estimation"] / 2, rel=0.05)
    assert loop["tuning"] == batch["tuning"]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_keeps_what_it_says(small_cfg, real_model, real_batch, name):
    model = real_model(small_cfg(), "warmup")
    candidates, made = find_candidates(model.backbone), []

    def make(candidates):
        made.append(ESTIMATORS[name](candidates))
        return made[0]

    batches = [real_batch(2), real_batch(2)]
    estimate_fisher(model, batches, SegmentationLoss(), candidates, estimator=make, progress=False)
    (estimator,) = made
    dense = 4 * sum(p.numel() for p in {c.parameter for c in candidates})
    kept = held_bytes({key: each for key, each in vars(estimator).items() if key != "candidates"})
    cost = estimator.cost
    assert kept == pytest.approx(cost.kept * dense, rel=1e-3)
    assert estimator_bytes(cost, candidates) == (2 * cost.kept + cost.extra) * dense


def test_checkpointed_blocks_keep_their_inputs(small_cfg):
    plain = _planned(small_cfg(TUNING__METHOD="full"), size=(96, 128))
    spared = _planned(
        small_cfg(TUNING__METHOD="full", MODEL__VFM__CHECKPOINT_BLOCKS=True), size=(96, 128)
    )
    assert spared["warmup"] == plain["warmup"]  # nothing to compute again
    assert spared["tuning"] < plain["tuning"]
    halved = _planned(
        small_cfg(TUNING__METHOD="full", SOLVER__ACCUMULATE=2), "tuning", size=(96, 128)
    )
    assert halved["tuning"] == pytest.approx(plain["tuning"] / 2, rel=0.05)


@pytest.mark.parametrize("method", ["fishertune", "full", "freeze"])
def test_averages_take_a_copy_of_the_trained_tensors(small_cfg, real_model, method):
    held = []
    for decay in (0.0, 0.999):
        cfg = small_cfg(TUNING__METHOD=method, SOLVER__EMA=decay)
        run = FakeRun(cfg, build_tuning_method(cfg), (48, 64))
        held.append([held_memory(run, stage).averages for stage in ("warmup", "tuning")])
    assert held[0] == [0, 0] and held[1][0] == 0
    model = real_model(cfg, "tuning")
    tensors = dict(model.named_parameters())
    if method == "fishertune":  # whole tensors, in which some entries are selected
        tensors = {n: p for n, p in model.state_dict().items() if n in _selected_or_head(model)}
    else:
        tensors = {n: p for n, p in tensors.items() if p.requires_grad}
    assert held[1][1] == sum(p.nbytes for p in tensors.values())


def _selected_or_head(model) -> set[str]:
    """The names of the trained tensors, from the names of the vectors of selected entries."""
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    return {n.replace("parametrizations.", "").removesuffix(".0.values") for n in names}
