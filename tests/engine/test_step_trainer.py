"""Autocast, gradient accumulation and checkpointed blocks through the real Trainer."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.step_trainer import _as_shares, _split, largest_part

from .conftest import same_states, train


def _trained(cfg, resume: bool = False) -> dict[str, torch.Tensor]:
    return train(cfg, resume=resume).segmentor.state_dict()


def _losses(cfg) -> list[float]:
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    return [json.loads(line)["total_loss"] for line in lines if "total_loss" in line]


@pytest.fixture
def points_of_the_losses_stay(monkeypatch):
    """Every mask gets the same points, or a part would draw others than the whole batch."""

    def rand(*shape, **options) -> torch.Tensor:
        shape = shape[0] if len(shape) == 1 else shape
        drawn = torch.empty(shape[-2:]).uniform_(generator=torch.Generator().manual_seed(0))
        return drawn.expand(shape).clone().to(options.get("device"))

    monkeypatch.setattr(torch, "rand", rand)


@pytest.mark.parametrize("parts", [2, 5])
def test_parts_add_up_to_the_whole_batch(tiny_cfg, points_of_the_losses_stay, parts):
    common = {
        "TUNING__METHOD": "full",
        "TUNING__WARMUP_ITERS": 0,
        "SOLVER__MAX_ITER": 1,
        "SOLVER__IMS_PER_BATCH": 5,  # in parts of different sizes
        "SOLVER__OPTIMIZER": "SGD",
        "SOLVER__BASE_LR": 1.0,
        # Crops of one class make the parts' numbers of masks differ.
        "INPUT__CROP__SIZE": [32, 40],
    }
    cfg = tiny_cfg(**common)
    start = Trainer(cfg).segmentor.state_dict()
    start = {name: tensor.clone() for name, tensor in start.items()}
    whole = _trained(cfg)
    summed_cfg = tiny_cfg("summed", **common, SOLVER__ACCUMULATE=parts)
    summed = _trained(summed_cfg)
    compared = 0
    for name, tensor in whole.items():
        step, other = tensor - start[name], summed[name] - start[name]
        scale = float(step.abs().max())
        if scale < 1e-4:  # some biases, as those before a norm, move by rounding alone
            continue
        # 0.005: where rounding carries a mask across its threshold, one point more or less counts.
        # Parts that divide by numbers of their own are off by 0.1 and more.
        torch.testing.assert_close(other, step, rtol=0, atol=5e-3 * scale, msg=name)
        compared += 1
    assert compared > 100
    assert _losses(summed_cfg) == pytest.approx(_losses(cfg), rel=1e-5)


def test_parts_differ_by_one_image_at_most():
    for images, parts, sizes in ((5, 2, [3, 2]), (6, 4, [2, 1, 2, 1]), (7, 3, [3, 2, 2])):
        found = _split(list(range(images)), parts)
        assert [len(part) for part in found] == sizes
        assert sum(found, []) == list(range(images))
        assert largest_part(images, parts) == max(sizes)
    assert _split([1, 2], 5) == [[1], [2]]


def test_checkpointed_blocks_change_no_number(tiny_cfg):
    plain = _trained(tiny_cfg())
    checkpointed = _trained(tiny_cfg("checkpointed", MODEL__VFM__CHECKPOINT_BLOCKS=True))
    assert same_states(checkpointed, plain)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_trains_float32_weights_and_resumes(tiny_cfg, precision):
    options = {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": precision}
    cfg = tiny_cfg(**options)
    whole = _trained(cfg)
    assert {tensor.dtype for tensor in whole.values() if tensor.is_floating_point()} == {
        torch.float32
    }
    plain_cfg = tiny_cfg("plain")
    _trained(plain_cfg)
    losses, plain = _losses(cfg), _losses(plain_cfg)
    assert losses != plain
    assert losses == pytest.approx(plain, rel=0.1)

    again = tiny_cfg(**options)
    Path(again.OUTPUT_DIR, "last_checkpoint").write_text("model_0000004.pth")
    assert same_states(_trained(again, resume=True), whole)
    state = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
    scaler = state["trainer"]["_trainer"]["grad_scaler"]
    assert bool(scaler) == (precision == "float16")  # bfloat16 has float32's range


@pytest.mark.parametrize("method", ["full", "fishertune"])
def test_a_fused_optimizer_clips_and_trains_as_the_plain_one(tiny_cfg, method):
    options = {
        "TUNING__METHOD": method,
        # Its gradients are scaled by 65,536 until they are clipped.
        "SOLVER__AMP__ENABLED": True,
        "SOLVER__AMP__PRECISION": "float16",
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model",
        # A limit that AdamW feels, whose steps do not depend on the gradients' scale.
        "SOLVER__CLIP_GRADIENTS__CLIP_VALUE": 1e-7,
    }
    plain = _trained(tiny_cfg("plain", **options))
    fused = _trained(tiny_cfg("fused", SOLVER__FUSED=True, **options))
    for name, tensor in plain.items():
        torch.testing.assert_close(fused[name], tensor, msg=name)


def test_the_losses_of_every_step_are_logged(tiny_cfg):
    trainer = Trainer(tiny_cfg(SOLVER__MAX_ITER=23))
    seen = []
    step = trainer._trainer.run_step

    def run_step() -> None:
        step()
        histories = trainer.storage.histories()
        seen.append(len(histories["total_loss"].values()) if "total_loss" in histories else 0)

    trainer._trainer.run_step = run_step
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert seen == [0] * 19 + [20] * 4  # one download for 20 steps
    values = trainer.storage.history("total_loss").values()
    assert [iteration for _, iteration in values] == list(range(23))
    assert len({value for value, _ in values}) == 23


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"SOLVER__AMP__PRECISION": "half"}, "SOLVER.AMP.PRECISION is 'half'"),
        ({"SOLVER__ACCUMULATE": 0}, "SOLVER.ACCUMULATE is 0"),
        ({"SOLVER__MATMUL_PRECISION": "tf32"}, "SOLVER.MATMUL_PRECISION is 'tf32': choose .*high,"),
    ],
)
def test_refuses(tiny_cfg, options, message):
    with pytest.raises(ValueError, match=message):
        Trainer(tiny_cfg(**options))


@SEM_SEG_HEADS_REGISTRY.register()
class HeadOfTwoLosses(SemSegFPNHead):
    def losses(self, predictions, targets):
        return super().losses(predictions, targets) | {"loss_extra": predictions.square().mean()}


def test_a_loss_that_no_part_of_a_batch_knows_is_refused_at_the_start(tiny_cfg):
    options = {"MODEL__SEM_SEG_HEAD__NAME": "HeadOfTwoLosses"}
    Trainer(tiny_cfg(**options))
    with pytest.raises(ValueError, match="loss loss_extra .*: set SOLVER.ACCUMULATE 1"):
        Trainer(tiny_cfg("parts", **options, SOLVER__ACCUMULATE=2))
    hard = {"MODEL__SEM_SEG_HEAD__LOSS_TYPE": "hard_pixel_mining"}
    deeplab = {
        "MODEL__SEM_SEG_HEAD__NAME": "DeepLabV3PlusHead",
        "MODEL__SEM_SEG_HEAD__IN_FEATURES": ["res2", "res5"],
        "MODEL__SEM_SEG_HEAD__PROJECT_CHANNELS": [32],
        "INPUT__CROP__SIZE": [64, 64],
    }
    with pytest.raises(ValueError, match="LOSS_TYPE hard_pixel_mining .*set SOLVER.ACCUMULATE 1"):
        Trainer(tiny_cfg("hard", **hard, **deeplab, SOLVER__ACCUMULATE=2))


def test_a_loss_whose_divisor_a_head_does_not_say_is_named():
    one = torch.ones(())
    assert _as_shares({"loss_ce_3": one}, {"loss_ce": 1.0}, {"loss_ce": 2.0}) == {"loss_ce_3": 0.5}
    with pytest.raises(ValueError, match="loss loss_new_2 .*known: loss_ce.*ACCUMULATE 1"):
        _as_shares({"loss_new_2": one}, {"loss_ce": 1.0}, {"loss_ce": 2.0})
