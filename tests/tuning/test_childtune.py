"""ChildTuning-D: F(x), and a share that does not grow."""

import pytest
import torch

from fishertune_d2.config import default_config
from fishertune_d2.engine.parameter_counts import count_tuned
from fishertune_d2.fisher import FisherEstimate, estimate_fisher, find_candidates
from fishertune_d2.tuning import build_tuning_method


@pytest.fixture
def cfg():
    cfg = default_config()
    cfg.TUNING.METHOD = "childtune"
    cfg.TUNING.SCHEDULE = "growing"  # of methods that leave it open
    return cfg


@pytest.mark.parametrize("squares", ["diagonal", "batch_mean"])
def test_the_score_is_the_fisher_information_of_the_task(cfg, squares, vit, images, loss):
    model = vit()
    estimate = estimate_fisher(model, [images(4)], loss, find_candidates(model), estimator=squares)
    estimate = FisherEstimate(estimate.f, {n: f + 1 for n, f in estimate.f.items()}, 0.5, 4)
    method = build_tuning_method(cfg)
    assert method.selects and method.estimates
    scores = method.scores(model, estimate)
    assert all(torch.equal(scores[name], estimate.f[name]) for name in estimate.f)
    assert set(scores) == set(method.parameters(model))


def test_the_share_does_not_grow(cfg, vit):
    model = vit()
    count = int(0.05 * sum(p.numel() for p in model.parameters()))
    assert [count_tuned(cfg, model, progress) for progress in (0.0, 0.5, 1.0)] == [count] * 3
