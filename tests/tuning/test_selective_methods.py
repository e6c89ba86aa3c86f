"""What each method that selects among the candidates scores."""

import pytest
import timm
import torch

from fishertune_d2.fisher import FisherEstimate, Selection, domain_related_fisher, find_candidates
from fishertune_d2.tuning import TuningMethod


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


def _chosen(method: TuningMethod, backbone, share: float) -> Selection:
    assert method.selects and not method.estimates
    scores = method.scores(backbone, None)
    shapes = {n: p.shape for n, p in method.parameters(backbone).items()}
    assert {n: score.shape for n, score in scores.items()} == shapes
    base = sum(p.numel() for p in backbone.parameters())
    return Selection.from_scores(scores, share, base)


def test_random_is_uniform_over_the_candidates(backbone, build_method):
    counts = _chosen(build_method("random"), backbone, 0.05).summary()
    sizes: dict = {}
    for c in find_candidates(backbone):
        sizes[c.kind, c.block] = sizes.get((c.kind, c.block), 0) + c.numel
    total, candidates = sum(counts.values()), sum(sizes.values())
    for group, size in sizes.items():
        expected = total * size / candidates
        assert abs(counts[group] - expected) < 5 * expected**0.5  # five standard deviations


def test_a_group_is_drawn_from_its_kinds_and_blocks(backbone, build_method):
    half = {"TUNING__GROUP__KINDS": ["Q", "FFN"], "TUNING__GROUP__DEPTH": [0.5, 1.0]}
    counts = _chosen(build_method("group", **half), backbone, 0.02).summary()
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


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_random_of_one_kind_stays_in_it(kind, backbone, build_method):
    counts = _chosen(build_method(f"random_{kind.lower()}"), backbone, 0.02).summary()
    assert sum(counts.values()) > 0
    assert all(count == 0 for (k, _), count in counts.items() if k != kind)


def test_random_depends_on_the_seed_alone(backbone, build_method):
    first, again, other = (
        _chosen(build_method("random", SEED=seed), backbone, 0.02) for seed in (1, 1, 2)
    )
    masks = [selection.masks(0.02) for selection in (first, again, other)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in masks[0])
    assert not all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])
