"""Detectron2's segmentation heads through the three stages, and the Fisher information on them."""

import json
from pathlib import Path

import pytest
import torch

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.fisher import FisherEstimate, estimate_fisher, find_candidates, seeded

FPN = {"NAME": "SemSegFPNHead"}
DEEPLAB = {
    "NAME": "DeepLabV3PlusHead",
    "IN_FEATURES": ["res2", "res5"],
    "PROJECT_CHANNELS": [32],
    "ASPP_CHANNELS": 32,
    "ASPP_DILATIONS": [1, 2, 3],
}
HEADS = pytest.mark.parametrize("keys", [FPN, DEEPLAB], ids=lambda keys: keys["NAME"])


def _options(keys: dict) -> dict:
    crop = {"INPUT__CROP__SIZE": [64, 64], "INPUT__MIN_SIZE_TRAIN": [64]}
    return {f"MODEL__SEM_SEG_HEAD__{key}": value for key, value in keys.items()} | crop


@HEADS
@pytest.mark.parametrize("accumulate", [1, 2])
def test_fishertune_trains_estimates_and_scores(keys, accumulate, tiny_cfg):
    options = _options(keys | {"LOSS_TYPE": "cross_entropy"})
    cfg = tiny_cfg(**options, SOLVER__ACCUMULATE=accumulate)
    trainer = Trainer(cfg)
    before = {name: value.clone() for name, value in trainer.segmentor.state_dict().items()}
    trainer.train()
    out = Path(cfg.OUTPUT_DIR)
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert lines and all(0 < line["loss_sem_seg"] < 10 for line in lines if "loss_sem_seg" in line)
    estimate = FisherEstimate.load(out / "fisher.safetensors")
    assert estimate.images == 4 and any(f.any() for f in estimate.f.values())
    after = trainer.segmentor.state_dict()
    moved = {name: int((after[name] != value).sum()) for name, value in before.items()}
    base = sum(p.numel() for p in trainer.segmentor.backbone.parameters())
    inside = sum(count for name, count in moved.items() if name.startswith("backbone."))
    assert 0 < inside <= 0.05 * base
    assert all(moved[name] for name in moved if name.startswith("sem_seg_head."))
    results = json.loads((out / "results.json").read_text())
    assert results["target_average"] is not None
    assert not trainer.segmentor.untrained


def _batch() -> list[dict]:
    torch.manual_seed(0)
    return [
        {"image": 255 * torch.rand(3, 64, 64), "sem_seg": torch.randint(0, 3, (64, 64))}
        for _ in range(3)
    ]


@HEADS
def test_the_loss_of_each_image_is_the_heads_own_without_dropout(keys, tiny_cfg):
    model = Trainer.build_model(tiny_cfg(**_options(keys | {"LOSS_WEIGHT": 3.0}))).train()
    batch = _batch()
    batch[0]["sem_seg"][:, :40] = 255
    losses = SegmentationLoss()(model, batch)
    assert all(module.training for module in model.sem_seg_head.modules())
    for part in model.sem_seg_head.modules():
        part.dropout = 0.0  # of ASPP
    for item, loss in zip(batch, losses, strict=True):
        torch.testing.assert_close(loss, model([item])["loss_sem_seg"])


@HEADS
@pytest.mark.parametrize("labels", ["ground_truth", "sampled"])
def test_loop_and_batch_measure_the_same(keys, labels, tiny_cfg):
    model = Trainer.build_model(tiny_cfg(**_options(keys))).train()
    fast, slow = (
        estimate_fisher(
            model, [_batch()], SegmentationLoss(), find_candidates(model.backbone), estimator=way,
            labels=labels,
        )
        for way in ("diagonal", "diagonal_loop")
    )  # fmt: skip
    f, reference = (torch.cat([v.flatten() for v in part.f.values()]) for part in (fast, slow))
    assert reference.any()
    assert (f - reference).norm() < 1e-4 * reference.norm()


def test_sampled_labels_are_drawn_from_the_softmax_of_the_logits(tiny_cfg):
    model = Trainer.build_model(tiny_cfg(**_options(FPN))).eval()
    with torch.no_grad():
        model.sem_seg_head.predictor.weight.zero_()
        model.sem_seg_head.predictor.bias.copy_(torch.tensor([0.0, 1.0, 2.0]))
    probabilities = torch.tensor([0.0, 1.0, 2.0]).softmax(0)
    entropy = -(probabilities * probabilities.log()).sum()
    with seeded(1):
        losses = SegmentationLoss().sampled(model, _batch())
    # Of 256 pixels; its standard deviation is 0.04.
    torch.testing.assert_close(losses, entropy.expand(3), rtol=0, atol=0.15)


def test_rein_says_that_it_needs_the_queries_of_mask2former(tiny_cfg):
    cfg = tiny_cfg(**_options(FPN), TUNING__METHOD="rein")
    with pytest.raises(ValueError, match="SemSegFPNHead has no learned queries"):
        Trainer(cfg).start_stage("tuning")
