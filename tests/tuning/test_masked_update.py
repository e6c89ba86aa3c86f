import pytest
import torch
from torch import nn

from fishertune_d2.fisher import Selection, Units
from fishertune_d2.tuning import MaskedUpdate


def _selection(score: torch.Tensor, share: float) -> Selection:
    return Selection.from_scores({"w": score}, share, score.numel())


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.5),
    ],
)
def test_equals_an_optimizer_that_holds_only_the_selected(make):
    torch.manual_seed(0)
    dense = nn.Parameter(torch.randn(4, 5, dtype=torch.float64))
    start = dense.detach().clone()
    selection = _selection(torch.rand(4, 5), 0.3)
    mask = selection.masks(0.3)["w"]
    sparse = nn.Parameter(start[mask].clone())
    target = torch.randn(4, 5, dtype=torch.float64)
    optimizer, reference = make([dense]), make([sparse])
    assert MaskedUpdate(optimizer, {"w": dense}, selection).grow(0.3) == 6
    for _ in range(50):
        optimizer.zero_grad()
        ((dense - target) ** 2).sum().backward()
        optimizer.step()
        full = start.masked_scatter(mask, sparse)
        reference.zero_grad()
        ((full - target) ** 2).sum().backward()
        reference.step()
    torch.testing.assert_close(dense[mask], sparse)
    assert torch.equal(dense[~mask], start[~mask])
    assert not torch.equal(dense[mask], start[mask])


def test_momentum_gathered_before_does_not_move_what_is_not_selected():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    weight.sum().backward()
    optimizer.step()  # every moment is above 0 now
    before = weight.detach().clone()
    MaskedUpdate(optimizer, {"w": weight}, _selection(torch.arange(1.0, 5.0), 0.25)).grow(0.25)
    optimizer.zero_grad()
    weight.sum().backward()
    optimizer.step()
    assert torch.equal(weight[:3], before[:3])
    assert weight[3] != before[3]


def test_an_infinite_gradient_of_what_is_not_selected_does_no_harm():
    weight = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    MaskedUpdate(optimizer, {"w": weight}, _selection(torch.arange(1.0, 5.0), 0.25)).grow(0.25)
    weight.grad = torch.tensor([torch.inf, torch.nan, 1.0, 1.0])
    optimizer.step()
    assert weight.tolist() == pytest.approx([1.0, 1.0, 1.0, 0.9])
    assert torch.isfinite(weight.grad).all()  # so that its norm can be clipped


def test_grows_and_never_shrinks():
    weight = nn.Parameter(torch.ones(10))
    selection = _selection(torch.arange(1.0, 11.0), 0.5)
    update = MaskedUpdate(torch.optim.SGD([weight], lr=0.1), {"w": weight}, selection)
    assert [update.grow(share) for share in (0.1, 0.3, 0.2, 0.5)] == [1, 3, 3, 5]
    assert update.masks["w"].tolist() == [False] * 5 + [True] * 5


def test_neurons_join_as_a_whole_and_are_counted_in_weights():
    torch.manual_seed(0)
    mlp = {"fc1.weight": (5, 3), "fc1.bias": (5,), "fc2.weight": (3, 5), "fc2.bias": (3,)}
    shapes = {f"blocks.0.mlp.{name}": shape for name, shape in mlp.items()}
    units = Units("neuron", shapes)
    scores = {"blocks.0.FFN": torch.tensor([0.1, 0.5, 0.3, 0.4, 0.2])}
    selection = Selection.from_scores(scores, 0.6, 38, units)  # 22 weights; a neuron has 7
    weights = {name: nn.Parameter(torch.randn(shape)) for name, shape in shapes.items()}
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=0.1, weight_decay=0.5)
    update = MaskedUpdate(optimizer, weights, selection)
    for share, held, count in ((0.1, 0.1, 0), (0.4, 0.4, 14), (0.2, 0.4, 14), (0.6, 0.6, 21)):
        assert update.grow(share) == count
        sum((2 * weight).sum() for weight in weights.values()).backward()
        optimizer.step()
        for name, mask in selection.masks(held).items():
            assert torch.equal(weights[name] != start[name], mask), name
    moved = {name.rpartition("mlp.")[2]: w != start[name] for name, w in weights.items()}
    assert moved["fc1.bias"].tolist() == [False, True, True, True, False]
    assert torch.equal(moved["fc2.weight"], moved["fc1.weight"].T)
    assert not moved["fc2.bias"].any()


class _Clipping(torch.optim.SGD):
    """Calls its parent's step, as Detectron2's clipping optimizers do: each hook runs twice."""

    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, _Clipping])
def test_steps_are_scaled_once(optimizer):
    weights = {"a": nn.Parameter(torch.ones(4)), "b": nn.Parameter(torch.ones(2, 2))}
    scores = {"a": torch.tensor([4.0, 0.0, 6.0, 0.0]), "b": torch.tensor([[0.0, 5.0], [0.0, 0.0]])}
    selection = Selection.from_scores(scores, 0.375, 8)
    selection.steps = {"a": torch.tensor([0.5, 2.0]), "b": torch.tensor([3.0])}
    stock = optimizer(weights.values(), lr=0.125)
    MaskedUpdate(stock, weights, selection).grow(0.375)
    for step in (1, 2):
        stock.zero_grad()
        sum(weight.sum() for weight in weights.values()).backward()
        stock.step()
        assert weights["a"].tolist() == [1 - 0.25 * step, 1, 1 - 0.0625 * step, 1]
        assert weights["b"].tolist() == [[1, 1 - 0.375 * step], [1, 1]]


def test_refuses_a_selection_of_another_model():
    weight = nn.Parameter(torch.ones(3))
    selection = _selection(torch.ones(4), 0.5)
    with pytest.raises(ValueError, match=r"the first is w, of shape \(3,\) here and \(4,\)"):
        MaskedUpdate(torch.optim.SGD([weight], lr=0.1), {"w": weight}, selection)
