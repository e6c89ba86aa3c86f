"""The three stages through the real Trainer on a tiny model."""

import json
import multiprocessing
import re
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.fisher import FisherEstimate, Selection

from .conftest import EXACT, same_end, train

# A training of which only the end counts: no scores, and one checkpoint.
LEAN = {"DATASETS__TEST": (), "SOLVER__CHECKPOINT_PERIOD": 100}


def _state(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def _metrics(cfg) -> list[dict]:
    return [json.loads(line) for line in (Path(cfg.OUTPUT_DIR) / "metrics.json").open()]


def test_three_stages_write_what_they_promise(tiny_cfg):
    cfg = tiny_cfg(SOLVER__CLIP_GRADIENTS__ENABLED=True)
    trainer = train(cfg)
    out = Path(cfg.OUTPUT_DIR)

    names = {name for name, _ in trainer.segmentor.named_parameters()}
    backbone = sum(p.numel() for p in trainer.segmentor.backbone.parameters())
    selection = Selection.load(out / "selection.safetensors")
    assert selection.base == backbone
    made = {"estimator": "diagonal", "labels": "ground_truth", "images": "4", "seed": "42"}
    assert selection.notes.items() >= made.items()
    assert len(torch.cat(list(selection.indices.values()))) == int(0.05 * backbone)
    estimate = FisherEstimate.load(out / "fisher.safetensors")
    assert estimate.images == 4
    assert set(estimate) == set(selection.shapes)
    assert {f"backbone.{name}" for name in estimate} <= names

    # The last iteration's scalars stand beside its losses; a line with the test results follows.
    (last,) = [line for line in _metrics(cfg) if "total_loss" in line]
    assert last["iteration"] == 6
    assert last["fisher/tuned_share"] == 0.05
    assert last["fisher/tuned_parameters"] == int(0.05 * backbone)
    (estimated,) = [line for line in _metrics(cfg) if "fisher/overlap_F" in line]
    assert estimated["iteration"] == 3
    assert 0.0 < estimated["fisher/overlap_F"] < 1.0
    assert 0.0 < estimated["fisher/overlap_dF"] < 1.0
    assert last["lr_backbone"] == pytest.approx(1e-3 * (1 - 6 / 7) ** 0.9)
    assert last["total_loss"] > 0

    results = json.loads((out / "results.json").read_text())
    assert set(results["source"]) == {"tiny_day"}
    assert results["target_average"] == results["targets"]["tiny_night"]
    assert results["tuned_parameters"] == int(0.05 * backbone)
    assert results["backbone_parameters"] == backbone
    assert results["protocol"]["class_rule"] == "present"
    assert results["protocol"]["vfm"] == cfg.MODEL.VFM.NAME
    assert (out / "pictures" / "tiny_night_0.png").is_file()


@pytest.mark.parametrize("clipping", ["", "norm", "full_model"])
def test_unselected_weights_stay_bit_identical(tiny_cfg, clipping):
    cfg = tiny_cfg(
        **LEAN,
        SOLVER__WEIGHT_DECAY=0.5,
        SOLVER__CLIP_GRADIENTS__ENABLED=bool(clipping),
        SOLVER__CLIP_GRADIENTS__CLIP_TYPE=clipping or "value",
        SOLVER__CLIP_GRADIENTS__CLIP_VALUE=0.01,
    )
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.segmentor.backbone.state_dict().items()}
    trainer.train()
    after = trainer.segmentor.backbone.state_dict()
    selection = Selection.load(Path(cfg.OUTPUT_DIR) / "selection.safetensors")
    masks = selection.masks(selection.share)
    moved = 0
    for name in before:
        mask = masks.get(name, torch.zeros_like(before[name], dtype=torch.bool))
        assert torch.equal(before[name][~mask], after[name][~mask]), name
        moved += int((before[name] != after[name]).sum())
    # Nearly every selected weight moves; one selected last may have a gradient of exactly 0.
    assert moved > 0.95 * selection.count(selection.share)


def test_weights_are_tuned_from_the_moment_they_are_selected(tiny_cfg):
    trainer = Trainer(tiny_cfg(**LEAN, TUNING__D_MIN=0.01, TUNING__D_MAX=0.05))
    start = {k: v.clone() for k, v in trainer.segmentor.backbone.state_dict().items()}
    counts = []

    class Watch(HookBase):
        def after_step(self):
            now = self.trainer.segmentor.backbone.state_dict()
            moved = sum(int((now[k] != start[k]).sum()) for k in start)
            tuned = self.trainer.storage.latest().get("fisher/tuned_parameters", (0, 0))[0]
            counts.append((moved, tuned))

    trainer.register_hooks([Watch()])
    trainer.train()
    backbone = sum(v.numel() for v in trainer.segmentor.backbone.parameters())
    assert [moved for moved, _ in counts[:3]] == [0, 0, 0]  # warm-up
    assert counts[3][1] == int(0.01 * backbone)
    assert counts[-1][1] == int(0.05 * backbone)
    for moved, tuned in counts[3:]:
        assert 0.9 * tuned < moved <= tuned


def test_warmup_pays_no_backward_pass_through_the_backbone(tiny_cfg):
    trainer = Trainer(tiny_cfg(**LEAN, SOLVER__MAX_ITER=3))
    seen = []
    trainer.segmentor.backbone.register_forward_hook(
        lambda module, inputs, output: seen.extend(o.requires_grad for o in output.values())
    )
    trainer.train()
    assert seen and not any(seen)


@pytest.mark.parametrize("method", ["freeze", "full"])
def test_other_methods(tiny_cfg, method):
    cfg = tiny_cfg(TUNING__METHOD=method)
    trainer = Trainer(cfg)
    before = {k: v.clone() for k, v in trainer.segmentor.backbone.named_parameters()}
    trainer.train()
    unused = trainer.segmentor.backbone.unused_parameters()
    for name, p in trainer.segmentor.backbone.named_parameters():
        moves = method == "full" and name not in unused
        assert torch.equal(before[name], p) != moves, name
    results = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    expected = sum(p.numel() for n, p in before.items() if n not in unused)
    assert results["tuned_parameters"] == (expected if method == "full" else 0)
    assert not (Path(cfg.OUTPUT_DIR) / "selection.safetensors").exists()


# Killed in warm-up, between warm-up and estimation, and in the tuning stage.
@pytest.mark.parametrize("iteration", [2, 3, 5])
def test_resume_gives_the_same_weights(tiny_cfg, finished_run, iteration):
    parts = tiny_cfg("parts", DATASETS__TEST=())
    train(parts, stop=iteration)
    torch.manual_seed(99)  # a new process has another random state
    train(parts, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)


def test_resume_after_a_kill_in_the_middle_of_the_estimation(tiny_cfg, finished_run):
    parts = tiny_cfg("parts", DATASETS__TEST=())
    trainer = Trainer(parts)
    batches = trainer._estimation_batches()

    def one_batch():
        yield next(batches)
        raise InterruptedError

    trainer._estimation_batches = one_batch
    with pytest.raises(InterruptedError):
        trainer.train()
    train(parts, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)


def test_the_loaders_workers_end_with_training(tiny_cfg):
    trainer = train(tiny_cfg(**LEAN, DATALOADER__NUM_WORKERS=2))
    assert not multiprocessing.active_children(), trainer


def test_methods_can_share_one_warmup(tiny_cfg, finished_run):
    freeze = tiny_cfg("freeze", **LEAN, TUNING__METHOD="freeze")
    train(freeze)
    warmup = str(Path(freeze.OUTPUT_DIR) / "model_warmup.pth")
    shared = tiny_cfg("shared", **LEAN, TUNING__WARMUP_CHECKPOINT=warmup)
    trainer = train(shared)
    assert trainer.start_iter == 3
    assert same_end(finished_run, shared.OUTPUT_DIR)

    longer = tiny_cfg("longer", TUNING__WARMUP_CHECKPOINT=warmup, TUNING__WARMUP_ITERS=4)
    with pytest.raises(ValueError, match="after 3 iterations, but TUNING.WARMUP_ITERS is 4"):
        Trainer(longer).resume_or_load(resume=False)


def test_resume_refuses_another_selection(tiny_cfg):
    cfg = tiny_cfg(DATASETS__TEST=())
    train(cfg, stop=5)
    file = Path(cfg.OUTPUT_DIR) / "selection.safetensors"
    selection = Selection.load(file)
    selection.notes["changed"] = "yes"
    selection.save(file)
    with pytest.raises(ValueError, match="is not the selection the checkpoint was trained with"):
        Trainer(cfg).resume_or_load(resume=True)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="selection.safetensors, which is gone"):
        Trainer(cfg).resume_or_load(resume=True)


def test_eval_only_from_a_checkpoint_gives_the_same_results(tiny_cfg, finished_run):
    cfg = tiny_cfg()
    trained = json.loads((finished_run / "results.json").read_text())
    results, weights = Path(cfg.OUTPUT_DIR) / "results.json", finished_run / "model_final.pth"
    Trainer.test(cfg, build_trained(cfg, str(weights)))
    assert json.loads(results.read_text()) == trained

    # A model that was filled by other means is scored, but nothing is known of its training.
    model = Trainer.build_model(cfg)
    model.load_state_dict(_state(weights))
    Trainer.test(cfg, model)
    again = json.loads(results.read_text())
    assert (again["source"], again["targets"]) == (trained["source"], trained["targets"])
    facts = ("method", "seed", "iterations", "warmup_iterations", "batch_size")
    assert [again["protocol"][fact] for fact in facts] == [None] * 5
    assert again["tuned_parameters"] is None


@pytest.mark.parametrize("method", ["random", "random_v", "fisher", "delta_fisher"])
def test_every_selective_method_trains(tiny_cfg, method):
    cfg = tiny_cfg(**LEAN, TUNING__METHOD=method, TUNING__D_MAX=0.02)
    trainer = train(cfg)
    out = Path(cfg.OUTPUT_DIR)
    assert (out / "fisher.safetensors").is_file() == trainer.method.estimates
    moved = Selection.load(out / "selection.safetensors").masks(0.02)
    warm, final = _state(out / "model_warmup.pth"), _state(out / "model_final.pth")
    for name, value in final.items():
        if name.startswith("backbone."):
            still = ~moved.get(name.removeprefix("backbone."), torch.zeros(value.shape).bool())
            assert torch.equal(value[still], warm[name][still]), name


def test_runs_can_share_one_estimate(tiny_cfg, finished_run):
    file = str(finished_run / "fisher.safetensors")
    shared = tiny_cfg("shared", **LEAN, FISHER__ESTIMATE=file)
    trainer = Trainer(shared)
    trainer._estimation_batches = None  # not needed
    trainer.train()
    assert same_end(finished_run, shared.OUTPUT_DIR)


def _near(one: torch.Tensor, other: torch.Tensor) -> bool:
    # bfloat16 is within 1 %, too.
    apart = float((one - other).norm() / one.norm())
    return apart <= (0 if EXACT else 1e-4)


def test_the_estimate_follows_its_keys(tiny_cfg):
    def estimate(name, **options):
        return Trainer(tiny_cfg(name, **options))._estimate()

    default = estimate("default")
    assert default.notes["estimator"] == "diagonal"
    others = {
        "points": estimate("points", FISHER__PERTURB__POINTS=[0]),
        "labels": estimate("labels", FISHER__LABELS="sampled"),
        "precision": estimate("precision", FISHER__PRECISION="bfloat16"),
        "natural": estimate("natural", FISHER__ESTIMATOR="natural"),
    }
    name = "vit.blocks.3.mlp.fc1.weight"
    for key, other in others.items():
        assert _near(default.f[name], other.f[name]) == (key == "points")
        assert not _near(default.shifted[name], other.shifted[name])


class _Spoil(HookBase):
    """Spoils an iteration: infinite weights of the decoder, or an infinite weight of one loss."""

    def __init__(self, iteration: int, what: str):
        self.iteration = iteration
        self.what = what

    def before_step(self) -> None:
        if self.trainer.iter != self.iteration:
            return
        head = self.trainer.segmentor.sem_seg_head
        if self.what == "loss":
            head.loss_weights["loss_dice"] = float("inf")
        else:
            head.class_predictor.bias.data.fill_(float("nan"))


@pytest.mark.parametrize(
    ("iteration", "what", "expected"),
    [
        (1, "loss", "iteration 1, stage warmup, on (.*): loss_dice is inf, loss_dice_0 is inf"),
        (4, "weights", "iteration 4, stage tuning, on (.*): Mask2FormerHead predicts NaN"),
    ],
)
def test_a_loss_that_is_not_finite_names_what_met_it_and_costs_nothing(
    tiny_cfg, finished_run, iteration, what, expected
):
    parts = tiny_cfg("parts", DATASETS__TEST=())
    with pytest.raises(FloatingPointError, match=expected) as stopped:
        train(parts, _Spoil(iteration, what))
    assert "The last checkpoint stands" in str(stopped.value)
    # The images are those of that step.
    trainer = Trainer(parts)
    trainer.data_loader.sampler.start = 2 * iteration
    names = ", ".join(item["file_name"] for item in next(iter(trainer.data_loader)))
    assert re.search(expected, str(stopped.value)).group(1) == names
    train(parts, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)


def test_a_prediction_that_is_not_finite_in_the_estimation_names_the_image(tiny_cfg):
    trainer = Trainer(tiny_cfg())
    trainer.segmentor.sem_seg_head.class_predictor.bias.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"estimation, on .*/\d.png: Mask2FormerHead pred"):
        trainer._estimate()


def test_an_estimate_of_another_model_is_refused_by_its_file(tiny_cfg, tmp_path):
    file = tmp_path / "other.safetensors"
    FisherEstimate({"blocks.0.mlp.fc1.bias": torch.ones(3)}, {}, 1.0, 1).save(file)
    trainer = Trainer(tiny_cfg(FISHER__ESTIMATE=str(file)))
    with pytest.raises(ValueError, match="other.safetensors was made for another model: "):
        trainer._estimate()


def test_another_number_of_processes_scales_warmup_with_the_rest(tiny_cfg):
    per_process = {"SOLVER__IMS_PER_BATCH": 4, "SOLVER__REFERENCE_WORLD_SIZE": 2}
    cfg = Trainer(tiny_cfg(**per_process, SOLVER__EMA_START=5, SELF_TRAINING__PERIOD=3)).cfg
    # one process, half as many
    assert (cfg.SOLVER.EMA_START, cfg.SELF_TRAINING.PERIOD) == (10, 6)
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (2, 5e-4)
    assert (cfg.SOLVER.MAX_ITER, cfg.TUNING.WARMUP_ITERS) == (14, 6)

    cfg = tiny_cfg(**per_process, TUNING__WARMUP_ITERS=7)
    cfg.freeze()
    assert Trainer.auto_scale_workers(cfg, 2) is cfg
    scaled = Trainer.auto_scale_workers(cfg, 4)
    assert scaled.is_frozen()
    assert scaled.SOLVER.MAX_ITER == scaled.TUNING.WARMUP_ITERS == 4  # rounded alike
    assert cfg.TUNING.WARMUP_ITERS == 7


@pytest.mark.parametrize("kind", ["night", "mixed"])
def test_the_estimate_can_shift_images_in_place_of_features(tiny_cfg, kind):
    """The run's notes say so; and Eq. 6 gives another F(x'), but the same F(x)."""
    cfg = tiny_cfg(FISHER__PERTURB__KIND=kind, FISHER__IMS_PER_BATCH=1, DATASETS__TEST=())
    train(cfg)
    found = FisherEstimate.load(Path(cfg.OUTPUT_DIR) / "fisher.safetensors")
    assert found.notes["shift"] == kind
    name = next(iter(found))
    assert not torch.equal(found.shifted[name], found[name])
