import pytest
import torch
from torch import nn

from fishertune_d2.fisher import SoftmaxLikelihood, sampled_nll


def test_labels_are_drawn_with_the_models_probabilities():
    p = torch.tensor([0.5, 0.3, 0.2])
    log_p = p.log()[None, :, None].expand(2, 3, 20_000)
    # With two kinds of log-probability the mean tells how often each label was drawn.
    mean = sampled_nll(log_p, [1, 2])
    entropy = -(p * p.log()).sum()
    spread = ((p * p.log() ** 2).sum() - entropy**2).sqrt() / 20_000**0.5
    assert ((mean - entropy).abs() < 5 * spread).all()
    assert mean[0] != mean[1]
    assert torch.equal(sampled_nll(log_p[:1], [2]), mean[1:])


def test_a_class_without_probability_is_never_drawn():
    log_p = torch.tensor([0.0, 1.0, 0.0]).log()[None, :, None].expand(1, 3, 1000)
    assert sampled_nll(log_p, [0]).item() == 0.0


def test_cross_entropy_of_maps_skips_what_is_not_labelled():
    logits = torch.randn(2, 3, 4, 5)
    labels = torch.randint(3, (2, 4, 5))
    labels[0, :2], labels[1] = -100, -100
    losses = SoftmaxLikelihood(lambda m, b: logits[b], lambda b: labels[b])(
        nn.Module(), torch.arange(2)
    )
    expected = nn.functional.cross_entropy(logits[:1, :, 2:], labels[:1, 2:])
    torch.testing.assert_close(losses[0], expected)
    assert losses[1] == 0.0


def test_without_labels_it_can_only_draw():
    likelihood = SoftmaxLikelihood(lambda m, b: torch.zeros(len(b), 2))
    nll = likelihood.sampled(nn.Module(), torch.arange(3))
    torch.testing.assert_close(nll, torch.full((3,), 2.0).log())
    with pytest.raises(ValueError, match="built without labels"):
        likelihood(nn.Module(), torch.arange(3))
