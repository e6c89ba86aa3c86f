"""The same share in each layer, at every prefix of the ranking."""

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishertune_d2.fisher import Selection, Units, find_candidates
from fishertune_d2.fisher.allocation import allocate


def _random_scores(units: Units, seed: int, levels: int) -> dict[str, torch.Tensor]:
    """Scores of at most ``levels`` values above 0, so that a few levels give many ties."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        key: units.shapes[key] if units.unit == "weight" else (group.count,)
        for key, group in units.groups.items()
    }
    return {
        key: torch.randint(1, levels + 1, shape, generator=generator).float()
        for key, shape in shapes.items()
    }


@st.composite
def _shapes(draw) -> dict[str, tuple[int, ...]]:
    """One to three blocks of a ViT, each of a width of its own."""
    shapes = {}
    for block in range(draw(st.integers(1, 3))):
        width, hidden = draw(st.integers(1, 6)), draw(st.integers(1, 9))
        shapes |= {
            f"blocks.{block}.attn.qkv.weight": (3 * width, width),
            f"blocks.{block}.attn.qkv.bias": (3 * width,),
            f"blocks.{block}.mlp.fc1.weight": (hidden, width),
            f"blocks.{block}.mlp.fc2.weight": (width, hidden),
            f"blocks.{block}.mlp.fc2.bias": (width,),
        }
    return shapes


@settings(max_examples=60, deadline=None)
@given(
    _shapes(),
    st.sampled_from(["weight", "neuron"]),
    st.integers(0, 2**20),
    st.sampled_from([2, 2**20]),
)
def test_every_prefix_has_the_same_share_of_each_layer(shapes, unit, seed, levels):
    units = Units(unit, shapes)
    scores = _random_scores(units, seed, levels)
    layer = {key: torch.zeros(score.shape, dtype=torch.int64) for key, score in scores.items()}
    for number, members in enumerate(units.layers.values()):
        for key, rows in members:
            layer[key][rows] = number
    weights = sum(group.count * group.size for group in units.groups.values())
    selection = Selection.from_scores(scores, 1.0, weights, units, "layer")
    count = sum(len(ranks) for ranks in selection.ranks.values())
    by_rank, score_by_rank = torch.empty(count, dtype=torch.int64), torch.empty(count)
    for key, ranks in selection.ranks.items():
        by_rank[ranks] = layer[key].flatten()[selection.indices[key]]
        score_by_rank[ranks] = scores[key].flatten()[selection.indices[key]]
    sizes = by_rank.bincount().tolist()

    assert count == sum(group.count for group in units.groups.values())
    held = [0] * len(sizes)
    for number in by_rank.tolist():
        held[number] += 1
        # One more unit would put any other layer level with, or ahead of, the fullest layer.
        fullest = max(h / size for h, size in zip(held, sizes, strict=True))
        assert all((h + 1) / s >= fullest - 1e-6 for h, s in zip(held, sizes, strict=True))
    for number in range(len(sizes)):
        own = score_by_rank[by_rank == number]
        assert torch.equal(own, own.sort(descending=True).values)


def test_ties_go_to_the_first_and_zeros_are_never_selected():
    shapes = {"blocks.0.attn.q_proj.weight": (2, 2), "blocks.1.attn.q_proj.weight": (3, 1)}
    scores = {
        "blocks.0.attn.q_proj.weight": torch.tensor([[0.0, 3.0], [3.0, 4.0]]),
        "blocks.1.attn.q_proj.weight": torch.tensor([[0.0], [-0.0], [1e-3]]),
    }
    found = allocate(scores, Units("weight", shapes), "layer")
    # The number of units in the layer by the place in it.
    torch.testing.assert_close(
        found["blocks.0.attn.q_proj.weight"], torch.tensor([[0.0, 4 / 2], [4 / 3, 4 / 1]])
    )
    assert found["blocks.1.attn.q_proj.weight"].flatten().tolist() == [0.0, 0.0, 3.0]


def test_a_global_allocation_keeps_the_scores():
    scores = {"w": torch.rand(3, 2)}
    assert allocate(scores, Units("weight", {"w": (3, 2)}), "global") is scores


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_a_vit_gets_five_percent_of_each_kind_in_each_block(unit):
    vit = timm.create_model("test_vit", num_classes=0)
    shapes = {c.name: tuple(c.parameter.shape) for c in find_candidates(vit)}
    units = Units(unit, shapes)
    torch.manual_seed(0)
    # Deep blocks score far higher, so that one ranking of all would take them alone.
    scores = {
        name: torch.rand(shape) * 10.0 ** int(name.split(".")[1]) for name, shape in shapes.items()
    }
    base = sum(c.numel for c in find_candidates(vit))
    by_layer = Selection.from_scores(units.mean(scores), 0.05, base, units, "layer")
    over_all = Selection.from_scores(units.mean(scores), 0.05, base, units)
    sizes = by_layer.group_sizes()
    # One of the largest units more or less, of 65 weights in Q, K and V, and of 129 in FFN.
    rounding = 1 if unit == "weight" else 129
    for layer, count in by_layer.summary().items():
        assert abs(count - 0.05 * sizes[layer]) <= rounding + 0.002 * sizes[layer], layer
    assert {block for (_, block), count in over_all.summary().items() if count} <= {4, 5}


def test_refuses():
    scores = {"w": torch.rand(3, 2)}
    units = Units("weight", {"w": (3, 2)})
    with pytest.raises(ValueError, match="unknown allocation 'block': choose from global, layer"):
        allocate(scores, units, "block")
    with pytest.raises(ValueError, match="w is in no block, so the allocation 'layer' has no"):
        allocate(scores, units, "layer")
