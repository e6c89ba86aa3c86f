"""What each method that selects among the candidates scores: single weights and neurons."""

from collections.abc import Callable, Iterator, Mapping

import pytest
import timm
import torch
from torch import Tensor, nn

from fishertune_d2.fisher import (
    UNITS,
    FisherEstimate,
    Selection,
    Units,
    domain_related_fisher,
    find_candidates,
)
from fishertune_d2.tuning import SelectiveMethod, TuningMethod


@pytest.fixture
def backbone():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=0)


@pytest.fixture
def estimate(backbone) -> FisherEstimate:
    names = [c.name for c in find_candidates(backbone)]
    parameters = dict(backbone.named_parameters())
    f, shifted = ({n: torch.rand_like(parameters[n]) for n in names} for _ in range(2))
    return FisherEstimate(f, shifted, 0.3, 4)


def test_the_terms_of_drf(backbone, estimate, build_method):
    assert build_method("fisher").scores(backbone, estimate) is estimate.f
    change = build_method("delta_fisher", FISHER__EPS=0.5).scores(backbone, estimate)
    name = "blocks.0.mlp.fc1.weight"
    f, shifted = estimate.f[name], estimate.shifted[name]
    torch.testing.assert_close(
        change[name], (f - shifted).abs() / (torch.minimum(f, shifted) + 0.5)
    )


@pytest.mark.parametrize("form", ["balanced", "eq7", "eq15", "rank"])
def test_fishertune_scores_drf_in_the_configured_form(form, backbone, estimate, build_method):
    scores = build_method("fishertune", FISHER__FORM=form).scores(backbone, estimate)
    expected = domain_related_fisher(estimate, form=form)
    assert all(torch.equal(scores[name], expected[name]) for name in expected)


def _neurons(values: Mapping[str, Tensor]) -> Iterator[tuple[str, int, list[Tensor]]]:
    """Each neuron of the ViT: the name of its group, its place there, and its weights' values."""
    for b in range(6):
        block = f"blocks.{b}"
        qkv, own = (values[f"{block}.attn.qkv.{part}"].double() for part in ("weight", "bias"))
        for k, kind in enumerate("QKV"):
            for i in range(width := len(own) // 3):
                row = k * width + i
                yield f"{block}.{kind}", i, [qkv[row], own[row]]
        fc1, own, fc2 = (
            values[f"{block}.mlp.{name}"].double()
            for name in ("fc1.weight", "fc1.bias", "fc2.weight")
        )
        for i in range(len(own)):
            yield f"{block}.FFN", i, [fc1[i], own[i], fc2[:, i]]


def _means(values: Mapping[str, Tensor], unit: str) -> dict[tuple[str, int], float]:
    """The mean of each unit's weights in float64, by its group and its place there."""
    if unit == "weight":
        flat = {name: value.flatten().tolist() for name, value in values.items()}
        return {(name, i): each for name in flat for i, each in enumerate(flat[name])}
    means = {}
    for group, i, parts in _neurons(values):
        numbers = [float(x) for part in parts for x in part.flatten()]
        means[group, i] = sum(numbers) / len(numbers)
    return means


class _Saliency(SelectiveMethod):
    """A method that only says what a weight scores."""

    def scores(self, backbone: nn.Module, estimate: FisherEstimate) -> Mapping[str, Tensor]:
        own = self.parameters(backbone)
        return {name: f * own[name].detach() ** 2 for name, f in estimate.f.items()}


class _PlainSaliency(TuningMethod):
    """Likewise, without the base class of selective methods."""

    selects = True
    parameters, scores = SelectiveMethod.parameters, _Saliency.scores


def _saliency(backbone: nn.Module, estimate: FisherEstimate, unit: str) -> Callable:
    own = dict(backbone.named_parameters())
    means = _means({n: f.double() * own[n].detach() ** 2 for n, f in estimate.f.items()}, unit)
    return means.__getitem__


def _drf(estimate: FisherEstimate, unit: str, rho: float) -> Callable:
    f, shifted = _means(estimate.f, unit), _means(estimate.shifted, unit)
    gamma = sum(f.values()) / len(f)

    def drf(key) -> float:
        change = abs(f[key] - shifted[key]) / (min(f[key], shifted[key]) + rho * gamma)
        return f[key] + gamma * estimate.shift_weight * change

    return drf


def _change(estimate: FisherEstimate, unit: str, eps: float) -> Callable:
    f, shifted = _means(estimate.f, unit), _means(estimate.shifted, unit)
    return lambda key: abs(f[key] - shifted[key]) / (min(f[key], shifted[key]) + eps)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize(
    "name", ["fishertune", "fisher", "childtune", "delta_fisher", "saliency", "plain"]
)
def test_each_unit_scores_what_a_plain_loop_over_its_weights_gives(
    name, unit, backbone, estimate, build_method
):
    own = {"saliency": _Saliency, "plain": _PlainSaliency}
    options = {"FISHER__RHO": 0.5, "FISHER__EPS": 0.25}
    method = own[name]() if name in own else build_method(name, **options)
    expected = {
        "fishertune": lambda: _drf(estimate, unit, rho=0.5),
        "fisher": lambda: _means(estimate.f, unit).__getitem__,
        "childtune": lambda: _means(estimate.f, unit).__getitem__,
        "delta_fisher": lambda: _change(estimate, unit, eps=0.25),
        "saliency": lambda: _saliency(backbone, estimate, unit),
        "plain": lambda: _saliency(backbone, estimate, unit),
    }[name]()
    units = Units(unit, estimate.shapes)
    scores = method.unit_scores(backbone, estimate, units)
    assert scores.keys() == units.groups.keys()
    for group, score in scores.items():
        assert score.numel() == units.groups[group].count
        wanted = torch.tensor([expected((group, i)) for i in range(score.numel())])
        torch.testing.assert_close(score.flatten(), wanted, rtol=1e-4, atol=2e-7)


def _units(unit: str, method: TuningMethod, backbone: nn.Module) -> Units:
    return Units(unit, {n: tuple(p.shape) for n, p in method.parameters(backbone).items()})


def _chosen(method: TuningMethod, backbone, share: float, unit: str = "weight") -> Selection:
    assert method.selects and not method.estimates
    units = _units(unit, method, backbone)
    scores = method.unit_scores(backbone, None, units)
    assert {n: score.numel() for n, score in scores.items()} == {
        name: group.count for name, group in units.groups.items()
    }
    base = sum(p.numel() for p in backbone.parameters())
    return Selection.from_scores(scores, share, base, units)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("random", {}),
        ("random_k", {}),
        ("group", {"TUNING__GROUP__KINDS": ["FFN", "Q"], "TUNING__GROUP__DEPTH": [0.5, 1.0]}),
    ],
)
def test_random_weights_are_drawn_candidate_by_candidate(name, options, backbone, build_method):
    method = build_method(name, SEED=7, **options)
    generator = torch.Generator().manual_seed(7)
    expected = {n: torch.zeros_like(p) for n, p in method.parameters(backbone).items()}
    for candidate in method.candidates(backbone):
        place = expected[candidate.name][candidate.rows]
        place.copy_(1.0 - torch.rand(place.shape, generator=generator))
    torch.testing.assert_close(method.scores(backbone, None), expected, rtol=0, atol=0)
    scores = method.unit_scores(backbone, None, _units("weight", method, backbone))
    torch.testing.assert_close(scores, expected, rtol=0, atol=0)


def test_random_neurons_are_drawn_whatever_their_sizes(backbone, build_method):
    method = build_method("random")
    units = _units("neuron", method, backbone)
    groups = units.groups.values()
    total, weights = sum(g.count for g in groups), sum(g.count * g.size for g in groups)
    assert len({group.size for group in groups}) > 1
    base = sum(p.numel() for p in backbone.parameters())
    found: dict[str, int] = dict.fromkeys(units.groups, 0)
    drawn = 0
    for seed in range(20):
        selection = _chosen(build_method("random", SEED=seed), backbone, 0.2, "neuron")
        assert selection.base == base and selection.weights(0.2) <= 0.2 * base
        drawn += selection.count(0.2)
        for name, indices in selection.indices.items():
            found[name] += len(indices)
    assert drawn / 20 == pytest.approx(total * 0.2 * base / weights, rel=0.1)
    for name, group in units.groups.items():
        expected = drawn * group.count / total
        assert abs(found[name] - expected) < 5 * expected**0.5  # five standard deviations


def test_random_is_uniform_over_the_candidates(backbone, build_method):
    counts = _chosen(build_method("random"), backbone, 0.05).summary()
    sizes: dict = {}
    for c in find_candidates(backbone):
        sizes[c.kind, c.block] = sizes.get((c.kind, c.block), 0) + c.numel
    total, candidates = sum(counts.values()), sum(sizes.values())
    for group, size in sizes.items():
        expected = total * size / candidates
        assert abs(counts[group] - expected) < 5 * expected**0.5  # five standard deviations


@pytest.mark.parametrize("unit", UNITS)
def test_a_group_is_drawn_from_its_kinds_and_blocks(unit, backbone, build_method):
    half = {"TUNING__GROUP__KINDS": ["Q", "FFN"], "TUNING__GROUP__DEPTH": [0.5, 1.0]}
    counts = _chosen(build_method("group", **half), backbone, 0.1, unit).summary()
    last = max(block for _, block in counts)
    chosen = {group for group, count in counts.items() if count}
    assert chosen == {(k, b) for k in ("Q", "FFN") for b in range((last + 1) // 2, last + 1)}


def test_thirds_of_the_depth_share_no_block_and_leave_none(backbone, build_method):
    blocks = []
    for depth in ([0.0, 0.3333], [0.3333, 0.6667], [0.6667, 1.0]):
        scores = build_method("group", TUNING__GROUP__DEPTH=depth).scores(backbone, None)
        blocks.append({c.block for c in find_candidates(backbone) if scores[c.name][c.rows].any()})
    assert sorted(block for third in blocks for block in third) == list(range(6))
    assert all(third for third in blocks)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"TUNING__GROUP__KINDS": ["P"]}, r"KINDS is \['P'\]: choose from Q, K"),
        ({"TUNING__GROUP__DEPTH": [0.5, 0.2]}, r"DEPTH is \[0.5, 0.2\]"),
    ],
)
def test_a_group_that_is_none_is_refused(options, named, build_method):
    with pytest.raises(ValueError, match=named):
        build_method("group", **options)


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_random_of_one_kind_stays_in_it(kind, unit, backbone, build_method):
    counts = _chosen(build_method(f"random_{kind.lower()}"), backbone, 0.02, unit).summary()
    assert sum(counts.values()) > 0
    assert all(count == 0 for (k, _), count in counts.items() if k != kind)


@pytest.mark.parametrize("unit", UNITS)
def test_random_depends_on_the_seed_alone(unit, backbone, build_method):
    first, again, other = (
        _chosen(build_method("random", SEED=seed), backbone, 0.02, unit) for seed in (1, 1, 2)
    )
    masks = [selection.masks(0.02) for selection in (first, again, other)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])
