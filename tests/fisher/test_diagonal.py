"""The two ways to square gradients per image, against torch.func, closed forms and each other."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad

from fishertune_d2.fisher import (
    Candidate,
    SoftmaxLikelihood,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
)
from fishertune_d2.fisher.estimators import diagonal

WAYS = ["diagonal", "diagonal_loop"]


def _candidate(name: str, parameter: nn.Parameter) -> Candidate:
    return Candidate(name, "FFN", 0, parameter, slice(0, len(parameter)), parameter.numel())


@pytest.mark.parametrize("way", WAYS)
def test_is_the_mean_of_squares_per_image_by_torch_func(way, vit, images, loss):
    model, pictures = vit(dtype=torch.float64), images(4)
    estimate = estimate_fisher(
        model, [pictures[:3], pictures[3:]], loss, find_candidates(model), estimator=way
    )
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def of_one(chosen, image, label):
        logits = functional_call(model, {**weights, **chosen}, (image[None].double(),))
        return nn.functional.cross_entropy(logits, torch.tensor([label], device=logits.device))

    for name in estimate:
        squares = [
            grad(of_one)({name: weights[name]}, image, label)[name] ** 2
            for image, label in pictures
        ]
        torch.testing.assert_close(estimate[name], torch.stack(squares).mean(0))
    assert estimate.images == 4


def test_both_ways_agree_whatever_the_layout(family, vit, images, loss):
    model = vit(family, torch.float64)
    batches = [images(8)[:5], images(8)[5:]]
    make = partial(estimate_fisher, model, batches, loss, find_candidates(model))
    points = [model.patch_embed, model.blocks[0]]
    prefix = getattr(model, "num_prefix_tokens", 0)
    shift = StatisticsPerturbation(points, num_prefix_tokens=[0, prefix])
    fast, slow = (make(estimator=way, perturb=shift) for way in WAYS)
    assert set(fast) == {c.name for c in find_candidates(model)}
    assert fast.shift_weight == slow.shift_weight
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-9, atol=1e-20)
        torch.testing.assert_close(fast.shifted[name], slow.shifted[name], rtol=1e-9, atol=1e-20)
        assert not torch.equal(fast[name], fast.shifted[name])


def test_both_ways_agree_in_float32(family, vit, images, loss):
    model = vit(family)
    make = partial(estimate_fisher, model, [images(8)], loss, find_candidates(model))
    fast, slow = (make(estimator=way) for way in WAYS)
    for name in fast:
        # The key's bias cannot change a softmax: its gradient is 0 but for rounding.
        if not name.endswith(("qkv.bias", "k_proj.bias")):
            error = (fast[name] - slow[name]).norm() / slow[name].norm()
            assert error < 1e-5, name


def test_the_batched_way_in_chunks_of_one(vit, images, loss, monkeypatch):
    model = vit(dtype=torch.float64)
    make = partial(estimate_fisher, model, [images(4)], loss, find_candidates(model))
    whole = make()
    monkeypatch.setattr(diagonal, "CHUNK_BYTES", 1)
    chunked = make()
    for name in whole:
        torch.testing.assert_close(chunked[name], whole[name])


def _softmax_regression() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double(), torch.randn(2, 4, dtype=torch.float64)


@pytest.mark.parametrize("way", WAYS)
def test_softmax_regression_has_the_analytic_empirical_fisher(way):
    model, x = _softmax_regression()
    labels = torch.tensor([2, 0])
    likelihood = SoftmaxLikelihood(
        lambda model, batch: model(x[batch]), lambda batch: labels[batch]
    )
    candidates = [_candidate("weight", model.weight), _candidate("bias", model.bias)]
    batches = [torch.arange(2)]
    estimate = estimate_fisher(model, batches, likelihood, candidates, estimator=way)
    residuals = model(x).softmax(1).detach() - nn.functional.one_hot(labels, 3)
    expected = torch.einsum("bc,bi->ci", residuals**2, x**2) / 2
    torch.testing.assert_close(estimate["weight"], expected)
    torch.testing.assert_close(estimate["bias"], (residuals**2).mean(0))


@pytest.mark.parametrize("way", WAYS)
def test_softmax_regression_has_the_analytic_fisher_with_sampled_labels(way):
    model, x = _softmax_regression()
    likelihood = SoftmaxLikelihood(lambda model, batch: model(x[batch]))
    draws = 1000 if way == "diagonal" else 300
    batches = [torch.arange(2).repeat(100)] * (draws // 100)
    candidates = [_candidate("weight", model.weight)]
    estimate = estimate_fisher(
        model, batches, likelihood, candidates, estimator=way, labels="sampled"
    )
    p = model(x).softmax(1).detach()
    expected = torch.einsum("bc,bi->ci", p * (1 - p), x**2) / 2  # E over y of (p - y)^2 x^2
    # (p - y)^2 is in [0, 1], so its mean over the draws is within 5 / (2 sqrt(draws)) at 5 sigma.
    bound = (5 / (2 * draws**0.5)) * (x**2).mean(0)
    assert ((estimate["weight"] - expected).abs() <= bound).all()


def test_is_not_the_square_of_the_mean_gradient():
    weight = nn.Parameter(torch.ones(1))
    # Gradients +1 and -1: the mean gradient is 0, the mean square is 1.
    batches = [torch.tensor([1.0, -1.0])]
    estimate = estimate_fisher(
        nn.Module(), batches, lambda m, x: weight * x, [_candidate("w", weight)],
        estimator="diagonal_loop",
    )  # fmt: skip
    assert estimate["w"].item() == 1.0


@pytest.mark.parametrize("way", WAYS)
def test_rows_that_are_no_candidates_are_zero(way, vit, images, loss):
    model = vit()
    candidates = [c for c in find_candidates(model) if c.kind in "QV"]
    make = partial(estimate_fisher, model, [images(2)], loss, estimator=way)
    f = make(candidates)["blocks.0.attn.qkv.weight"]
    everything = make(find_candidates(model))["blocks.0.attn.qkv.weight"]
    assert f[24:48].count_nonzero() == 0
    torch.testing.assert_close(f[:24], everything[:24])
    torch.testing.assert_close(f[48:], everything[48:])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_gradient_that_is_not_finite_is_named(way, bad, vit, images, loss):
    model, pictures = vit(), images(3)

    def broken(model, batch):
        losses = loss(model, batch)
        hits = [image is pictures[1][0] for image, _ in batch]
        hit = torch.tensor(hits, device=losses.device)
        # The value stays finite, its gradient does not.
        return losses + torch.where(hit, _InfiniteSlope.apply(losses, bad), 0.0)

    with pytest.raises(FloatingPointError, match=r"of blocks\.\S+ is not finite on image 1 of bat"):
        estimate_fisher(model, [pictures], broken, find_candidates(model), estimator=way)


class _InfiniteSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bad):
        ctx.bad = bad
        return torch.zeros_like(x)

    @staticmethod
    def backward(ctx, gradient):
        # Only where the result was used, or every image would be hit.
        return torch.where(gradient != 0, gradient * ctx.bad, 0.0), None


class _Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)

    def forward(self, x):
        return self.layer(self.layer(x))


class _Product(_Twice):
    def forward(self, x):
        return x @ self.layer.weight.T


class _Folded(_Twice):
    def forward(self, x):
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (_Twice(), "w is used twice in one forward pass over a batch.*'diagonal_loop'"),
        (_Product(), "w has another use than as the weight or bias of a linear layer.*_loop'"),
        (_Folded(), r"w sees \(3, 2, 2\) in a batch of 2 images.*'diagonal_loop'"),
    ],
)
@pytest.mark.parametrize("estimator", ["diagonal", "natural", "variational", "pathwise"])
def test_what_catches_linear_layers_refuses_other_models(estimator, model, message):
    batches, candidates = [torch.randn(2, 3, 2)], [_candidate("w", model.layer.weight)]

    def loss(model, batch):
        return model(batch).square().sum((1, 2))

    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, batches, loss, candidates, estimator=estimator)
    assert estimate_fisher(model, batches, loss, candidates, estimator="diagonal_loop").images == 2


def test_a_frozen_model_can_be_measured(vit, images, loss):
    model = vit()
    make = partial(estimate_fisher, model, [images(2)], loss, find_candidates(model))
    trainable = make()
    model.requires_grad_(False)
    for way in WAYS:
        frozen = make(estimator=way)
        name = "blocks.0.mlp.fc1.weight"
        torch.testing.assert_close(frozen[name], trainable[name])
        assert not any(p.requires_grad for p in model.parameters())


def test_activation_checkpoints_change_nothing(vit, images, loss):
    model = vit(dtype=torch.float64)
    make = partial(estimate_fisher, model, [images(3)], loss, find_candidates(model))
    plain = make()
    model.set_grad_checkpointing()
    for way in WAYS:
        checkpointed = make(estimator=way)
        for name in plain:
            torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-9, atol=1e-20)
