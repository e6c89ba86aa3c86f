"""Squares of batch-mean gradients, against torch.func and what they are in expectation."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from fishertune_d2.fisher import Candidate, SoftmaxLikelihood, estimate_fisher, find_candidates


def test_is_the_mean_over_batches_of_the_square_of_the_mean(vit, images, loss):
    model, pictures = vit(dtype=torch.float64), images(5)
    batches = [pictures[:3], pictures[3:]]
    estimate = estimate_fisher(model, batches, loss, find_candidates(model), estimator="batch_mean")
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of_batch(chosen, batch):
        pixels = torch.stack([image for image, _ in batch]).double()
        logits = functional_call(model, {**weights, **chosen}, (pixels,))
        labels = torch.tensor([label for _, label in batch], device=logits.device)
        return nn.functional.cross_entropy(logits, labels)

    for name in estimate:
        squares = [grad(of_batch)({name: weights[name]}, batch)[name] ** 2 for batch in batches]
        torch.testing.assert_close(estimate[name], sum(squares) / 2)
    assert estimate.images == 5


def test_what_images_disagree_about_counts_less():
    """m^2 + v / B against m^2 + v, for gradients that are the images themselves."""
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    candidates = [Candidate("weight", "FFN", 0, weight, slice(0, 1), 2)]
    model = nn.Linear(2, 1, bias=False).double()
    model.weight = weight
    torch.manual_seed(0)
    # The mean is 3, the variance 4, of one feature; 0 and 4 of the other.
    x = 2 * torch.randn(250, 8, 2, dtype=torch.float64) + torch.tensor([3.0, 0.0])

    def loss(model, batch):
        return model(batch)[:, 0]

    of_batches, of_images = (
        estimate_fisher(model, list(x), loss, candidates, estimator=way)["weight"][0]
        for way in ("batch_mean", "diagonal")
    )
    expected = torch.tensor([[9 + 4 / 8, 4 / 8], [9 + 4, 4]], dtype=torch.float64)
    torch.testing.assert_close(torch.stack([of_batches, of_images]), expected, rtol=0.25, atol=0)


def test_a_batch_of_one_is_the_diagonal(family, vit, images, loss):
    model = vit(family, torch.float64)
    batches = [[each] for each in images(3)]
    alone, diagonal = (
        estimate_fisher(model, batches, loss, find_candidates(model), estimator=way)
        for way in ("batch_mean", "diagonal_loop")
    )
    for name in diagonal:
        torch.testing.assert_close(alone[name], diagonal[name])


def test_a_gradient_that_is_not_finite_is_named():
    layer = nn.Linear(2, 2)
    likelihood = SoftmaxLikelihood(lambda model, batch: model(batch).sqrt())
    candidates = [Candidate("weight", "FFN", 0, layer.weight, slice(0, 2), 4)]
    layer.weight.data.zero_()
    layer.bias.data.zero_()  # the slope of a root at 0 is infinite
    with pytest.raises(FloatingPointError, match="gradient of weight is not finite on image 0 of"):
        estimate_fisher(
            layer, [torch.ones(2, 2)], likelihood, candidates, estimator="batch_mean",
            labels="sampled",
        )  # fmt: skip
