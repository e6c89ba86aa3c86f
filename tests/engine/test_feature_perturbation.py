"""Eq. 6 in training (the paper's "+FP"), through the real Trainer."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.trained_model import build_trained

from .conftest import TOLERANCE, same_states, train


class _Watch(HookBase):
    """Sees that no hook stays behind after a step."""

    def after_step(self) -> None:
        for point in self.trainer.segmentor.backbone.perturbation_points():
            assert not point._forward_hooks


def _run(cfg, resume: bool = False) -> tuple[list[float], dict]:
    trainer = train(cfg, _Watch(), resume=resume)
    losses = [loss for loss, _ in trainer.storage.history("total_loss").values()]
    return losses, {k: v.clone() for k, v in trainer.segmentor.state_dict().items()}


@pytest.fixture
def fp_cfg(tiny_cfg):
    """``tiny_cfg`` with Eq. 6 on, and neither tests nor their pictures."""

    def make(output: str, **overrides):
        options = {"DATASETS__TEST": (), "TUNING__FEATURE_PERTURBATION": True} | overrides
        return tiny_cfg(output, **options)

    return make


@pytest.mark.parametrize("method", ["full", "fishertune"])
def test_it_perturbs_the_steps_of_tuning(fp_cfg, method):
    plain, _ = _run(fp_cfg("off", TUNING__METHOD=method, TUNING__FEATURE_PERTURBATION=False))
    shifted, _ = _run(fp_cfg("on", TUNING__METHOD=method))
    assert len(plain) == len(shifted) == 7
    assert shifted[:3] == pytest.approx(plain[:3], rel=TOLERANCE, abs=0)
    assert shifted[3:] != pytest.approx(plain[3:], rel=TOLERANCE, abs=0)


def test_a_shift_of_strength_0_changes_no_bit(fp_cfg):
    """Its random numbers are its own: the loss draws the points that it draws without."""
    plain, expected = _run(fp_cfg("off", TUNING__METHOD="full", TUNING__FEATURE_PERTURBATION=False))
    still, got = _run(fp_cfg("still", TUNING__METHOD="full", FISHER__PERTURB__STRENGTH=0.0))
    assert still == pytest.approx(plain, rel=TOLERANCE, abs=0)
    assert same_states(got, expected)


def test_about_half_of_the_batches_are_perturbed(fp_cfg):
    trainer = Trainer(fp_cfg("out", TUNING__METHOD="full", TUNING__WARMUP_ITERS=0))
    trainer.start_stage("tuning")
    tokens, perturbed = torch.randn(2, 17, 64), 0
    for seed in range(200):
        with trainer._shift(seed):
            block = trainer._perturbation.points[1]
            moved = [hook(block, (), tokens) for hook in block._forward_hooks.values()]
        perturbed += not torch.equal(moved[0], tokens)
    assert abs(perturbed - 100) < 5 * 50**0.5  # five standard deviations


def test_parts_of_different_sizes_are_perturbed(fp_cfg):
    options = {"TUNING__METHOD": "full", "SOLVER__IMS_PER_BATCH": 5, "SOLVER__ACCUMULATE": 2}
    _run(fp_cfg("parts", **options, SOLVER__MAX_ITER=8))


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(fp_cfg):
    _, expected = _run(fp_cfg("whole", TUNING__METHOD="full"))
    parts = fp_cfg("parts", TUNING__METHOD="full")
    train(parts, _Watch(), stop=5)
    _, got = _run(parts, resume=True)
    assert same_states(got, expected)


def test_evaluation_is_not_perturbed(fp_cfg):
    tests = {"DATASETS__TEST": ("tiny_day", "tiny_night"), "TUNING__METHOD": "full"}
    cfg = fp_cfg("on", **tests)
    _run(cfg)  # which tests at its end
    out = Path(cfg.OUTPUT_DIR)
    shifted = json.loads((out / "results.json").read_text())
    other = fp_cfg("off", **tests, TUNING__FEATURE_PERTURBATION=False)
    Trainer.test(other, build_trained(other, str(out / "model_final.pth")))
    expected = json.loads(Path(other.OUTPUT_DIR, "results.json").read_text())
    # The checkpoint says how it was trained, whatever the config of the evaluation says.
    assert shifted["protocol"]["feature_perturbation"] and shifted == expected
    assert shifted["targets"]["tiny_night"] > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SOLVER__IMS_PER_BATCH": 1}, "IMS_PER_BATCH 1 over 1 processes, in 1 parts"),
        ({"SOLVER__ACCUMULATE": 2}, "in 2 parts .SOLVER.ACCUMULATE., is 1 images"),
        ({"SOLVER__IMS_PER_BATCH": 6, "SOLVER__ACCUMULATE": 4}, "in 4 parts .*, is 1 images"),
        ({"MODEL__VFM__CHECKPOINT_BLOCKS": True}, "set MODEL.VFM.CHECKPOINT_BLOCKS to False"),
    ],
)
def test_what_it_does_not_go_with_is_refused(fp_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(fp_cfg("out", **options))
