"""The trainer with neurons in place of single weights, and with the same share in each layer."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer
from fishertune_d2.fisher import (
    STEPS,
    UNITS,
    FisherEstimate,
    Selection,
    domain_related_fisher,
    steps_of_units,
)

from .conftest import same_end, train

# A training of which only the end counts: no scores, and one checkpoint.
LEAN = {"DATASETS__TEST": (), "SOLVER__CHECKPOINT_PERIOD": 100}
NEURONS = {"TUNING__UNIT": "neuron"}
BY_LAYER = {"TUNING__UNIT": "neuron", "TUNING__ALLOCATION": "layer"}
WEIGHTS_BY_LAYER = {"TUNING__ALLOCATION": "layer"}


def _state(cfg: CfgNode, name: str) -> dict[str, torch.Tensor]:
    path, prefix = Path(cfg.OUTPUT_DIR) / name, "backbone."
    state = torch.load(path, map_location="cpu", weights_only=True)["model"]
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def _scalars(cfg: CfgNode, name: str) -> list[float]:
    lines = [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").open()]
    return [line[name] for line in lines if name in line]


@pytest.mark.parametrize("keys", [NEURONS, BY_LAYER, WEIGHTS_BY_LAYER], ids=str)
def test_only_the_selected_units_move_to_the_bit(tiny_cfg, keys):
    cfg = tiny_cfg(**LEAN, **keys, SOLVER__WEIGHT_DECAY=0.5)
    trainer = train(cfg)
    selection = Selection.load(Path(cfg.OUTPUT_DIR) / "selection.safetensors")
    assert selection.unit == cfg.TUNING.UNIT
    assert selection.notes.get("allocation", "global") == cfg.TUNING.ALLOCATION
    start, end = (_state(cfg, name) for name in ("model_warmup.pth", "model_final.pth"))
    masks = selection.masks(selection.share)
    moved = 0
    for name, before in start.items():
        still = ~masks.get(name, torch.zeros(before.shape, dtype=torch.bool))
        assert torch.equal(before[still], end[name][still]), name
        moved += int((before != end[name]).sum())
    count = selection.weights(0.05)
    largest = max(group.size for group in selection.units.groups.values())
    planned = int(0.05 * sum(p.numel() for p in trainer.backbone.parameters()))
    assert planned - largest < count <= planned
    assert 0.95 * count < moved <= count

    # The log and metrics.json count weights, and compare with F of the same units.
    assert _scalars(cfg, "fisher/tuned_parameters")[-1] == count
    assert 0.0 < _scalars(cfg, "fisher/overlap_F")[0] < 1.0
    if cfg.TUNING.ALLOCATION == "layer":
        counts, sizes = selection.summary(), selection.group_sizes()
        shares = [counts[group] / sizes[group] for group in sizes]
        assert max(shares) - min(shares) < 0.02  # of 64 neurons and more
    else:
        assert any(len(indices) == 0 for indices in selection.indices.values())


def test_neurons_are_ranked_by_drf_of_their_means(tiny_cfg):
    cfg = tiny_cfg(**LEAN, **NEURONS)
    train(cfg)
    out = Path(cfg.OUTPUT_DIR)
    estimate = FisherEstimate.load(out / "fisher.safetensors")
    chosen = Selection.load(out / "selection.safetensors")
    means: list[dict[str, torch.Tensor]] = []
    for values in (estimate.f, estimate.shifted):
        by_unit = {}
        for name, group in chosen.units.groups.items():
            flat = torch.zeros(group.count, dtype=torch.float64)
            for part in group.parts:
                own = values[part.name].double().movedim(part.dim, 0)
                own = own[part.start : part.start + group.count]
                flat += own.reshape(group.count, -1).sum(1)
            by_unit[name] = flat / group.size
        means.append(by_unit)
    scores = domain_related_fisher(FisherEstimate(*means, estimate.shift_weight, estimate.images))
    expected = Selection.from_scores(scores, chosen.share, chosen.base, chosen.units)
    for name, indices in expected.indices.items():
        assert set(chosen.indices[name].tolist()) == set(indices.tolist()), name


@pytest.mark.parametrize("unit", UNITS)
def test_a_step_is_scaled_by_the_sensitivity_of_its_unit(tiny_cfg, unit):
    moved = {}
    for steps in STEPS:
        cfg = tiny_cfg(
            steps,
            **LEAN,
            TUNING__UNIT=unit,
            TUNING__STEPS=steps,
            TUNING__SCHEDULE="constant",
            SOLVER__OPTIMIZER="SGD",
            SOLVER__MAX_ITER=4,  # one step of tuning
        )
        train(cfg)
        start, end = (_state(cfg, name) for name in ("model_warmup.pth", "model_final.pth"))
        moved[steps] = {name: end[name] - before for name, before in start.items()}
    out = Path(cfg.OUTPUT_DIR)
    selection = Selection.load(out / "selection.safetensors")
    factors = steps_of_units(FisherEstimate.load(out / "fisher.safetensors").f, selection)
    shaped = {}
    for name, group in selection.units.groups.items():
        shaped[name] = torch.ones(group.count)
        shaped[name][selection.indices[name]] = factors[name]
        shaped[name] = shaped[name].view(selection.shapes.get(name, (-1,)))
    spread = selection.units.spread(shaped)
    assert max(float(plain.abs().max()) for plain in moved["equal"].values()) > 1e-5
    for name, plain in moved["equal"].items():
        expected = plain * spread[name] if name in spread else plain
        torch.testing.assert_close(moved["fisher"][name], expected, rtol=1e-2, atol=3e-8)


# Between warm-up and estimation, and in the tuning stage.
@pytest.mark.parametrize(
    ("iteration", "keys"),
    [(3, BY_LAYER), (5, BY_LAYER), (5, NEURONS | {"TUNING__STEPS": "fisher"})],
)
def test_a_resumed_run_ends_as_if_it_had_not_stopped(tiny_cfg, iteration, keys):
    ends = []
    for name, stop in (("whole", None), ("parts", iteration)):
        cfg = tiny_cfg(name, **keys, DATASETS__TEST=())
        if stop:
            train(cfg, stop=stop)
            torch.manual_seed(99)  # a new process has another random state
        train(cfg, resume=stop is not None)
        ends.append(cfg.OUTPUT_DIR)
    assert same_end(*ends)


def _forget_the_keys(folder: str) -> None:
    """Makes the checkpoints of a run those of a time without the keys of units."""
    for path in Path(folder).glob("*.pth"):
        checkpoint = torch.load(path, weights_only=True)
        for key in ("TUNING.UNIT", "TUNING.ALLOCATION", "TUNING.STEPS"):
            del checkpoint["run"]["config"][key]
        torch.save(checkpoint, path)


def test_a_run_of_a_time_without_the_keys_resumes(tiny_cfg, finished_run):
    cfg = tiny_cfg("parts", DATASETS__TEST=())
    train(cfg, stop=5)
    _forget_the_keys(cfg.OUTPUT_DIR)
    for key, value, then in (
        ("UNIT", "neuron", "weight"),
        ("ALLOCATION", "layer", "global"),
        ("STEPS", "fisher", "equal"),
    ):
        other = tiny_cfg("parts", DATASETS__TEST=(), **{f"TUNING__{key}": value})
        told = f"with the {key.lower()} '{then}', and this run asks for '{value}': set TUNING.{key}"
        with pytest.raises(ValueError, match=told):
            Trainer(other).resume_or_load(resume=True)
    train(cfg, resume=True)
    assert same_end(finished_run, cfg.OUTPUT_DIR)


def test_a_checkpoint_of_another_unit_is_refused_by_its_record(tiny_cfg):
    cfg = tiny_cfg(**NEURONS, DATASETS__TEST=())
    train(cfg, stop=5)
    with pytest.raises(ValueError, match="TUNING.UNIT was 'neuron' and is 'weight'"):
        Trainer(tiny_cfg(DATASETS__TEST=())).resume_or_load(resume=True)


def test_steps_resume_without_the_estimate_that_they_came_from(tiny_cfg):
    cfg = tiny_cfg(**NEURONS, TUNING__STEPS="fisher", DATASETS__TEST=())
    train(cfg, stop=5)
    (Path(cfg.OUTPUT_DIR) / "fisher.safetensors").unlink()
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer._estimation.selection.steps is not None


@pytest.mark.parametrize("method", ["random", "random_v", "fisher", "delta_fisher", "childtune"])
def test_every_selective_method_trains_neurons(tiny_cfg, method):
    cfg = tiny_cfg(**LEAN, **NEURONS, TUNING__METHOD=method, TUNING__D_MAX=0.02)
    train(cfg)
    selection = Selection.load(Path(cfg.OUTPUT_DIR) / "selection.safetensors")
    assert selection.unit == "neuron"
    if method == "random_v":
        assert {name for name, found in selection.indices.items() if len(found)} == {
            f"vit.blocks.{block}.V" for block in range(6)
        }
    start, end = (_state(cfg, name) for name in ("model_warmup.pth", "model_final.pth"))
    moved = {name: end[name] != start[name] for name in start}
    masks = selection.masks(0.02)
    assert not any((moved[name] & ~mask).any() for name, mask in masks.items())
    assert sum(int(each.sum()) for each in moved.values()) > 0.5 * selection.weights(0.02)


def test_runs_of_both_units_share_an_estimate(tiny_cfg, finished_run):
    file = str(finished_run / "fisher.safetensors")
    trainer = Trainer(tiny_cfg(**LEAN, **NEURONS, FISHER__ESTIMATE=file))
    trainer._estimation_batches = None  # not needed
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer._estimation.selection.unit == "neuron"


def _process(rank: int, config: str, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    cfg = default_config()
    cfg.merge_from_file(config)
    trainer = Trainer(cfg)
    trainer.train()
    torch.save(trainer.segmentor.state_dict(), folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_train_the_same_neurons(tiny_cfg, start_process, tmp_path):
    cfg = tiny_cfg(**LEAN, **BY_LAYER, MODEL__DEVICE="cpu")  # gloo
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    processes = [start_process(_process, rank, str(config), tmp_path) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, other = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    selection = Selection.load(Path(cfg.OUTPUT_DIR) / "selection.safetensors")
    start = _state(cfg, "model_warmup.pth")
    moved = {name: one[f"backbone.{name}"] != start[name] for name in selection.shapes}
    assert not any((moved[name] & ~mask).any() for name, mask in selection.masks(0.05).items())
    assert sum(int(each.sum()) for each in moved.values()) > 0.5 * selection.weights(0.05)
