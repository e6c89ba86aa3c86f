"""The segmentor's loss of each image, and the Fisher information measured with it."""

import pytest
import torch
from torch import nn

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.fisher import (
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
    seeded,
)


@pytest.fixture
def model(tiny_cfg) -> nn.Module:
    return Trainer.build_model(tiny_cfg()).train()


def _batch(sizes) -> list[dict]:
    torch.manual_seed(0)
    return [
        {
            "image": 255 * torch.rand(3, *size),
            "sem_seg": torch.randint(0, 3, size),
            "file_name": f"{i}.png",
        }
        for i, size in enumerate(sizes)
    ]


def test_is_the_training_loss_of_a_batch_of_one(model):
    (item,) = batch = _batch([(48, 64)])
    with seeded(3):
        expected = sum(model(batch).values())
    # Outside an estimate, an image's seed derives from torch's own.
    torch.manual_seed(5)
    seeds = []

    def recorded(seed):
        seeds.append(seed)
        return seeded(3)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fishertune_d2.engine.image_losses.seeded", recorded)
        torch.testing.assert_close(SegmentationLoss()(model, [item]), expected[None])
    assert len(seeds) == 1


def test_does_not_depend_on_the_rest_of_the_batch(model):
    batch = _batch([(48, 64)] * 3)
    batch[0]["sem_seg"][:] = 255  # no label at all
    batch[1]["sem_seg"][:] = 1  # one mask, where image 2 has three
    together = SegmentationLoss()(model, batch)
    assert together.shape == (3,) and together.isfinite().all()
    torch.testing.assert_close(SegmentationLoss()(model, batch[:1]), together[:1])


@pytest.mark.parametrize("labels", ["ground_truth", "sampled"])
def test_loop_and_batch_measure_the_same_on_mask2former(model, labels):
    batches = [_batch([(48, 64)] * 3)]
    points = model.backbone.perturbation_points()
    perturb = StatisticsPerturbation(points, num_prefix_tokens=model.backbone.num_prefix_tokens)
    fast, slow = (
        estimate_fisher(
            model, batches, SegmentationLoss(), find_candidates(model.backbone), estimator=way,
            labels=labels, perturb=perturb,
        )
        for way in ("diagonal", "diagonal_loop")
    )  # fmt: skip
    for f, reference in ((fast.f, slow.f), (fast.shifted, slow.shifted)):
        f, reference = (torch.cat([v.flatten() for v in part.values()]) for part in (f, reference))
        # Together: some tensors have a gradient of nothing but rounding. In float32, which
        # Mask2Former's losses are computed in; in float64, tests/fisher asks for 1e-9 of each.
        assert (f - reference).norm() < 1e-5 * reference.norm()


def test_sampled_labels_ignore_padding(model):
    # The second image is padded to the first one's size; what it adds must not be counted.
    small, large = _batch([(32, 48), (48, 64)])
    losses = SegmentationLoss().sampled(model, [large, small])
    assert losses.shape == (2,) and losses.isfinite().all()
    # As likely as the classes are many, before training.
    assert (losses > 0.2).all() and (losses < 3.0).all()
