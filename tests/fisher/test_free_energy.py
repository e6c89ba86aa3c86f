"""The estimators of Lambda: on a quadratic loss they converge to the closed form (Eq. 14)."""

from functools import partial

import pytest
import timm
import torch
from torch import nn

from fishertune_d2.fisher import (
    Candidate,
    ClosedForm,
    FreeEnergy,
    Natural,
    Pathwise,
    Variational,
    estimate_fisher,
    find_candidates,
)

GAMMA, TAU = 1e-3, 2.0


def _regression() -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """Least squares whose residuals are +1 or -1, so that squared gradients are the Hessian."""
    torch.manual_seed(0)
    scales = torch.tensor([0.3, 1.0, 2.0, 0.7])
    x = torch.randn(32, 4) * scales
    model = nn.Linear(4, 2, bias=False)
    residuals = torch.where(torch.rand(32, 2) < 0.5, -1.0, 1.0)
    return model, x, model(x).detach() + residuals


def _precision(estimator, batches: int):
    """Lambda of the regression's weights, by ``estimator``."""
    model, x, y = _regression()
    weight = model.weight
    candidates = [Candidate("w", "FFN", 0, weight, slice(0, 2), weight.numel())]
    made = []

    def make(candidates):
        made.append(estimator(candidates, FreeEnergy(GAMMA, TAU)))
        return made[0]

    def loss(model, batch):
        return 0.5 * (model(x[batch]) - y[batch]).square().sum(1)

    estimate = estimate_fisher(
        model, [torch.arange(32)] * batches, loss, candidates, estimator=make, seed=1
    )
    f = GAMMA * (made[0].precision()["w"] - TAU**-2)  # Eq. 14
    torch.testing.assert_close(estimate["w"], f, rtol=1e-4, atol=0.0)
    return made[0].precision()["w"], (x**2).mean(0).expand(2, 4)


def test_closed_form():
    precision, hessian = _precision(ClosedForm, 1)
    torch.testing.assert_close(precision, hessian / GAMMA + TAU**-2)


def test_natural_gradient_converges_to_it():
    precision, hessian = _precision(Natural, 300)
    # Perturbed weights add x^T Lambda^-1 x = gamma * 4 to squares of 1; the rest is the noise of
    # an average over 1 / beta = 50 batches.
    torch.testing.assert_close(precision, hessian / GAMMA + TAU**-2, rtol=0.03, atol=0.0)


# As above. What is left of a pathwise estimate is the noise of 300 draws for each of 32 images.
BY_DRAWS = pytest.mark.parametrize(("estimator", "rtol"), [(Variational, 0.02), (Pathwise, 0.06)])


@BY_DRAWS
def test_variational_converges_to_it(estimator, rtol):
    precision, hessian = _precision(estimator, 300)
    torch.testing.assert_close(precision, hessian / GAMMA + TAU**-2, rtol=rtol, atol=0.0)


@BY_DRAWS
def test_variational_per_row_converges_to_the_rows_mean(estimator, rtol):
    precision, hessian = _precision(partial(estimator, resolution="row"), 300)
    # One Lambda for the row makes the sum of Eq. 14 over its weights stationary.
    expected = hessian.mean(1, keepdim=True).expand(2, 4) / GAMMA + TAU**-2
    torch.testing.assert_close(precision, expected, rtol=rtol, atol=0.0)


class _Attention(nn.Module):
    """A module that gives a layer the name of a neuron's weights."""

    def __init__(self, **layers: nn.Module):
        super().__init__()
        block = nn.Module()
        block.attn = nn.ModuleDict(layers)
        self.blocks = nn.ModuleList([block])


@BY_DRAWS
def test_variational_per_neuron_converges_to_the_neurons_mean(estimator, rtol):
    layer, x, y = _regression()
    layer.bias = nn.Parameter(torch.zeros(2))
    model = _Attention(q_proj=layer)
    candidates = find_candidates(model)
    made = []

    def make(candidates):
        made.append(estimator(candidates, FreeEnergy(GAMMA, TAU), resolution="neuron"))
        return made[0]

    def loss(model, batch):
        return 0.5 * (model.blocks[0].attn["q_proj"](x[batch]) - y[batch]).square().sum(1)

    batches = [torch.arange(32)] * 300
    estimate = estimate_fisher(model, batches, loss, candidates, estimator=make, seed=1)
    # Four weights with the curvatures x^2, and a bias with the curvature 1.
    mean = ((x.double() ** 2).mean(0).sum() + 1) / 5
    expected = (mean / GAMMA + TAU**-2).float()
    weight, bias = (f"blocks.0.attn.q_proj.{part}" for part in ("weight", "bias"))
    precision = made[0].precision()
    torch.testing.assert_close(precision[weight], expected.expand(2, 4), rtol=rtol, atol=0.0)
    torch.testing.assert_close(precision[bias], expected.expand(2), rtol=rtol, atol=0.0)
    assert (estimate[weight] == estimate[bias][:, None]).all()


def test_a_draw_per_neuron_has_the_variance_of_its_mean():
    vit = timm.create_model("test_vit", num_classes=0).double()
    candidates = find_candidates(vit)
    variational = Variational(candidates, FreeEnergy(GAMMA, TAU), resolution="neuron")
    torch.manual_seed(0)
    variational.images = 3
    variational.sums = {name: torch.rand_like(value) for name, value in variational.sums.items()}
    variances, fisher = variational._variances(), variational.fisher()
    sums = {name[9:]: value for name, value in variational.sums.items() if ".2." in name}
    # Neuron 5 of K, in the rows after those of Q, and hidden neuron 7 of 192.
    k, hidden = 64 + 5, 7
    members = {
        "attn.qkv.weight": (k, sums["attn.qkv.weight"][k].tolist() + [sums["attn.qkv.bias"][k]]),
        "mlp.fc2.weight": (
            (slice(None), hidden),
            sums["mlp.fc1.weight"][hidden].tolist()
            + [sums["mlp.fc1.bias"][hidden]]
            + sums["mlp.fc2.weight"][:, hidden].tolist(),
        ),
    }
    for name, (place, values) in members.items():
        mean = sum(float(value) for value in values) / len(values) / 3
        assert len(values) == {"attn.qkv.weight": 65, "mlp.fc2.weight": 129}[name]
        for found, expected in ((fisher, mean), (variances, 1 / (mean / GAMMA + TAU**-2))):
            torch.testing.assert_close(
                found[f"blocks.2.{name}"][place],
                torch.full((64,), expected, dtype=torch.float64),
            )
    own = fisher["blocks.2.mlp.fc2.bias"]  # part of no neuron
    torch.testing.assert_close(own, sums["mlp.fc2.bias"] / 3)


def test_variational_starts_from_the_closed_form():
    precision, hessian = _precision(partial(Variational, start=3), 3)
    torch.testing.assert_close(precision, hessian / GAMMA + TAU**-2)
    moved, _ = _precision(partial(Variational, start=3), 4)
    assert not torch.equal(moved, precision)


def test_pathwise_follows_the_curvature_and_variational_the_squares():
    weight = nn.Parameter(torch.zeros(1, 1))
    candidates = [Candidate("w", "FFN", 0, weight, slice(0, 1), 1)]

    def loss(model, batch):  # slope 3 and curvature 1 at y = 0
        y = nn.functional.linear(batch, weight).flatten()
        return 1 - y.cos() + 3 * y

    energy = partial(FreeEnergy, gamma=1e-6, tau=1.0)
    found = {
        make: estimate_fisher(
            nn.Module(),
            [torch.ones(64, 1)] * 200,
            loss,
            candidates,
            estimator=lambda c, make=make: make(c, energy(), start=1),
        )["w"].item()
        for make in (Variational, Pathwise)
    }
    assert found[Variational] == pytest.approx(9.0, rel=1e-2)
    assert found[Pathwise] == pytest.approx(1.0, rel=0.1)


def test_constants_from_the_start():
    weight = nn.Parameter(torch.tensor([[3.0, -1.0], [1.0, 5.0]]))
    energy = FreeEnergy()
    energy.calibrate_to_fisher({"w": weight}, {"w": [slice(0, 1)]}, 8.0)
    assert energy.tau == pytest.approx(((9 + 1) / 2) ** 0.5)  # of the candidate row
    # A hundredth of the mean F over two weights.
    assert energy.gamma * energy.prior_precision == pytest.approx(0.01 * 8.0 / 2)


def test_constants_from_the_first_batch():
    weight = nn.Parameter(torch.tensor([[3.0, -1.0], [1.0, 5.0]]))
    energy = FreeEnergy(loss_share=0.25)
    energy.calibrate({"w": weight}, {"w": [slice(0, 1)]}, torch.tensor([2.0, 4.0]))
    assert energy.tau == pytest.approx(((9 + 1) / 2) ** 0.5)  # of the candidate row
    # Two weights add gamma / 2 each: together a quarter of the mean loss of 3.
    assert 2 * energy.gamma / 2 == pytest.approx(0.25 * 3.0)
    before = energy.gamma
    energy.calibrate({"w": weight}, {"w": [slice(0, 2)]}, torch.tensor([7.0]))
    assert energy.gamma == before


def test_rows_that_are_no_candidates_stay_unperturbed_and_zero():
    model = nn.Linear(3, 4)
    rows = [Candidate("w", "Q", 0, model.weight, slice(1, 3), 6)]
    x = torch.randn(6, 3)
    outputs = []

    def loss(model, batch):
        outputs.append(model(x[batch]))
        return outputs[-1].square().sum(1)

    plain = model(x).detach()
    for estimator in (Natural, partial(Variational, start=1), partial(Pathwise, start=1)):
        estimate = estimate_fisher(model, [torch.arange(6)] * 3, loss, rows, estimator=estimator)
        torch.testing.assert_close(outputs[-1][:, [0, 3]], plain[:, [0, 3]])
        assert not torch.allclose(outputs[-1][:, 1:3], plain[:, 1:3])
        assert estimate["w"][[0, 3]].count_nonzero() == 0
        assert estimate["w"][1:3].count_nonzero() > 0


def test_refuses():
    with pytest.raises(ValueError, match="gamma must be positive: got 0"):
        FreeEnergy(gamma=0)
    with pytest.raises(ValueError, match=r"beta must be in \(0, 1\]: got 2"):
        Natural([], beta=2)
    with pytest.raises(ValueError, match="unknown resolution 'block'"):
        Variational([], resolution="block")
    weight = nn.Parameter(torch.zeros(2, 2))
    with pytest.raises(ValueError, match="so there are no neurons: choose"):
        Variational([Candidate("w", "FFN", 0, weight, slice(0, 2), 4)], resolution="neuron")
    with pytest.raises(ValueError, match="start must be at least 1 batch: got 0"):
        Variational([], start=0)
