import pytest
import torch
from torch import nn

from fishertune_d2.fisher import Candidate, Smoothed, estimate_fisher


def _estimate(model: nn.Linear, x: torch.Tensor, rows, weight: float) -> torch.Tensor:
    """F of a linear layer; the loss is the sum of its outputs' squares."""
    candidates = [
        Candidate("w", kind, 0, model.weight, part, part.stop - part.start) for kind, part in rows
    ]
    estimate = estimate_fisher(
        model, [x], lambda m, b: m(b).square().sum(1), candidates,
        estimator=lambda c: Smoothed(c, weight),
    )  # fmt: skip
    return estimate["w"]


@pytest.fixture
def model() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(3, 4).double()


def test_is_the_geometric_mean_of_squares_and_fit(model):
    x, whole = torch.randn(5, 3).double(), [("FFN", slice(0, 4))]
    squares, half, fit = (_estimate(model, x, whole, weight) for weight in (0.0, 0.5, 1.0))
    expected = squares.mean(1)[:, None] * squares.mean(0)[None] / squares.mean()
    torch.testing.assert_close(fit, expected)
    torch.testing.assert_close(half, (squares * expected).sqrt())
    # The fit keeps the sums of rows and columns.
    torch.testing.assert_close(fit.sum(0), squares.sum(0))
    torch.testing.assert_close(fit.sum(1), squares.sum(1))


def test_one_image_is_of_rank_one_and_stays_as_it_is(model):
    x, whole = torch.randn(1, 3).double(), [("FFN", slice(0, 4))]
    torch.testing.assert_close(_estimate(model, x, whole, 0.5), _estimate(model, x, whole, 0.0))


def test_kinds_of_a_fused_matrix_are_fitted_one_by_one(model):
    x = torch.randn(5, 3).double()
    parts = [("Q", slice(0, 2)), ("K", slice(2, 4))]
    together = _estimate(model, x, parts, 0.5)
    for part in parts:
        torch.testing.assert_close(together[part[1]], _estimate(model, x, [part], 0.5)[part[1]])


def test_is_nearer_the_truth_than_few_squares_where_the_truth_is_of_rank_one():
    torch.manual_seed(0)
    truth = torch.rand(40, 1) * torch.rand(1, 60)
    noisy = torch.stack([truth * torch.randn(40, 60).square() for _ in range(8)]).mean(0)
    smoothed = Smoothed([Candidate("w", "FFN", 0, nn.Parameter(truth), slice(0, 40), 2400)])
    smoothed.sums["w"].copy_(8 * noisy)
    smoothed.images = 8
    errors = [(f.log() - truth.log()).square().mean() for f in (smoothed.fisher()["w"], noisy)]
    assert errors[0] < 0.5 * errors[1]


def test_what_is_zero_stays_zero(model):
    x = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 1.0]]).double()
    f = _estimate(model, x, [("FFN", slice(0, 4))], 0.5)
    assert (f[:, 1] == 0).all() and (f[:, [0, 2]] > 0).all()
    assert (_estimate(model, torch.zeros(2, 3).double(), [("FFN", slice(0, 4))], 0.5) == 0).all()


def test_refuses():
    with pytest.raises(ValueError, match=r"weight must be in \[0, 1\]: got 2"):
        Smoothed([], weight=2)
