import pytest
import torch

from fishertune_d2.fisher import FisherEstimate, domain_related_fisher, relative_change
from fishertune_d2.fisher import score as module
from fishertune_d2.fisher.score import fisher_from_precision, posterior_precision

F = {"a": torch.tensor([4.0, 0.0]), "b": torch.tensor([[2.0]])}
SHIFTED = {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([[3.0]])}
ESTIMATE = FisherEstimate(F, SHIFTED, 0.5, images=4)


def test_equation_14_and_its_inverse():
    precision = posterior_precision(torch.tensor([4.0, 0.0]), gamma=0.5, prior_precision=0.25)
    assert precision.tolist() == [8.25, 0.25]
    assert fisher_from_precision(precision, 0.5, 0.25).tolist() == [4.0, 0.0]
    assert fisher_from_precision(torch.tensor([0.2]), 0.5, 0.25).item() == 0.0  # clamped


def test_equation_5_and_7_by_hand():
    change = relative_change(F, SHIFTED, eps=1.0)
    assert change["a"].tolist() == [3.0 / 2.0, 0.0]
    assert change["b"].item() == pytest.approx(1.0 / 3.0)
    score = domain_related_fisher(ESTIMATE, form="eq7", eps=1.0)
    assert score["a"].tolist() == [4.0 + 0.5 * 1.5, 0.0]


def test_equation_15_by_hand():
    score = domain_related_fisher(ESTIMATE, form="eq15", gamma=2.0, tau=2.0, eps=1.0)
    # Lambda = 4/2 + 1/4 and 1/2 + 1/4; the ratio's guard is eps / gamma = 1/2.
    expected = 2.0 * (2.25 - 0.25 + 0.5 * 1.5 / (0.75 + 0.5))
    assert score["a"].tolist() == pytest.approx([expected, 0.0])


def test_balanced_is_equation_15_with_constants_of_the_estimate():
    mean = (4.0 + 2.0) / 2  # over what is above 0
    score = domain_related_fisher(ESTIMATE, rho=0.01)
    # F + gamma * w * |F - F'| / (min(F, F') + gamma * tau^-2)
    assert score["a"][0].item() == pytest.approx(4.0 + mean * 0.5 * 3.0 / (1.0 + 0.01 * mean))
    assert score["b"].item() == pytest.approx(2.0 + mean * 0.5 * 1.0 / (2.0 + 0.01 * mean))
    assert score["a"][1].item() == 0.0


@pytest.mark.parametrize("form", ["balanced", "eq7", "eq15", "rank"])
def test_three_arguments_in_place_of_the_estimate_still_work(form):
    with pytest.warns(FutureWarning, match="now called with the estimate alone"):
        former = domain_related_fisher(F, SHIFTED, 0.5, form=form)
    score = domain_related_fisher(ESTIMATE, form=form)
    assert all(torch.equal(former[name], score[name]) for name in F)
    with pytest.raises(TypeError, match="takes a FisherEstimate"):
        domain_related_fisher(F)


@pytest.mark.parametrize("form", ["balanced", "rank"])
def test_the_ranking_does_not_see_the_scale_of_the_loss(form):
    torch.manual_seed(0)
    f, shifted = torch.rand(100), torch.rand(100)
    orders = []
    for scale in (1.0, 1e-9):
        estimate = FisherEstimate({"a": scale * f}, {"a": scale * shifted}, 0.5, images=4)
        orders.append(domain_related_fisher(estimate, form=form, eps=0.0)["a"].argsort())
    assert torch.equal(*orders)


def test_rank_by_hand():
    score = domain_related_fisher(ESTIMATE, form="rank", eps=0.001)
    assert score["a"].tolist() == [1.0 + 0.5 * 1.0, 0.0]
    assert score["b"].item() == 0.5 + 0.5 * 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("at_once", [1, 7, 10**6])
def test_ranks_in_parts_are_those_of_one_sort(monkeypatch, dtype, at_once):
    torch.manual_seed(0)
    # Whole numbers, so that many are equal and some are 0.
    f = {"a": torch.randint(0, 9, (20, 30)).to(dtype), "b": torch.randn(50).abs().to(dtype)}
    flat = torch.cat([f["a"].flatten(), f["b"]])
    expected, order = torch.zeros_like(flat), flat.argsort(stable=True)
    order = order[flat[order] > 0]
    expected[order] = (torch.arange(1, len(order) + 1) / len(order)).to(dtype)
    monkeypatch.setattr(module, "RANKED_AT_ONCE", at_once)
    estimate = FisherEstimate(f, f, 1.0, images=4)  # dF is 0, and so is its rank
    found = domain_related_fisher(estimate, form="rank")
    assert torch.equal(torch.cat([found["a"].flatten(), found["b"]]), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_best_come_first_and_of_equal_values_the_first(dtype):
    torch.manual_seed(0)
    values = torch.cat([torch.randint(0, 9, (600,)).to(dtype), torch.randn(50).abs().to(dtype)])
    values[::7] = -0.0  # equal to 0
    before = values.clone()
    expected = values.argsort(descending=True, stable=True)
    assert torch.equal(module.best_first(values), expected)
    assert torch.equal(values, before)


def test_refuses():
    with pytest.raises(ValueError, match="unknown form 'sum'"):
        domain_related_fisher(ESTIMATE, form="sum")
    with pytest.raises(ValueError, match=r"shift_weight must be in \(0, 1\]: got 1.5"):
        domain_related_fisher(FisherEstimate(F, SHIFTED, 1.5, images=4))
    with pytest.raises(ValueError, match=r"estimate has no F\(x'\), .*: estimate with perturb="):
        domain_related_fisher(FisherEstimate(F, {}, 1.0, images=4))
    zeros = {"a": torch.zeros(2)}
    with pytest.raises(ValueError, match="F.x. is 0 for every weight"):
        domain_related_fisher(FisherEstimate(zeros, zeros, 0.5, images=4))
