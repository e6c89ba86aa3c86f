import json

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from fishertune_d2.fisher import Selection, Units, find_candidates, overlap


def _scores(*values) -> dict[str, torch.Tensor]:
    return {f"p{i}": torch.tensor(value, dtype=torch.float32) for i, value in enumerate(values)}


def test_the_best_of_all_tensors_in_rank_order():
    selection = Selection.from_scores(_scores([0.1, 0.9], [[0.5, 0.8], [0.0, 0.7]]), 0.3, 10)
    assert selection.indices["p0"].tolist() == [1]
    assert selection.indices["p1"].tolist() == [1, 3]
    assert selection.ranks["p0"].tolist() == [0]
    assert selection.ranks["p1"].tolist() == [1, 2]
    assert selection.masks(0.2)["p1"].tolist() == [[False, True], [False, False]]


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=6), min_size=1, max_size=4),
    st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
)
def test_equals_a_full_sort_and_is_nested(values, shares):
    scores = _scores(*values)  # integers, so there are many ties
    flat = torch.cat(list(scores.values()))
    base, positive = flat.numel(), int((flat > 0).sum())
    share = positive / base
    selection = Selection.from_scores(scores, share, base)
    small, large = (selection.masks(s * share) for s in shares)
    for s, masks in zip(shares, (small, large), strict=True):
        count = selection.count(s * share)
        best = flat.argsort(descending=True, stable=True)[:count]
        expected = torch.zeros_like(flat, dtype=torch.bool).index_fill_(0, best, True)
        assert torch.equal(torch.cat(list(masks.values())), expected)
    assert all((large[name] | ~small[name]).all() for name in scores)


def test_paper_count_on_the_meta_arithmetic():
    selection = Selection({}, {}, {}, 0.05, 304_199_680)
    assert selection.count(0.05) == 15_209_984


def test_more_numbers_than_torch_quantile_takes():
    torch.manual_seed(0)
    score = torch.rand(17_000_000)
    selection = Selection.from_scores({"p": score}, 0.01, score.numel())
    assert len(selection.indices["p"]) == 170_000
    best = score.topk(170_000).values
    assert torch.equal(score[selection.indices["p"]], best)


def test_summary_by_kind_and_block_and_file_round_trip(tmp_path):
    vit = timm.create_model("test_vit", num_classes=0)
    candidates = find_candidates(vit)
    torch.manual_seed(0)
    scores = {c.name: torch.rand_like(c.parameter) for c in candidates}
    base = sum(p.numel() for p in vit.parameters())
    selection = Selection.from_scores(scores, 0.05, base)
    summary = selection.summary()
    assert sum(summary.values()) == selection.count(0.05)
    mask = selection.masks(0.05)["blocks.2.attn.qkv.weight"]
    bias = selection.masks(0.05)["blocks.2.attn.qkv.bias"]
    assert summary["K", 2] == int(mask[64:128].sum() + bias[64:128].sum())

    selection.notes["made_by"] = "a test"
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert (loaded.share, loaded.base, loaded.notes) == (0.05, base, {"made_by": "a test"})
    assert loaded.shapes == selection.shapes
    masks, again = selection.masks(0.03), loaded.masks(0.03)
    assert all(torch.equal(masks[name], again[name]) for name in masks)


def test_is_printed_as_a_table_of_thirds_or_blocks():
    vit = timm.create_model("test_vit", num_classes=0)
    scores = {c.name: torch.zeros_like(c.parameter) for c in find_candidates(vit)}
    scores["blocks.4.mlp.fc1.weight"][:] = 1.0
    scores["blocks.1.attn.qkv.bias"][:64] = 2.0  # Q
    count = scores["blocks.4.mlp.fc1.weight"].numel() + 64
    base = sum(p.numel() for p in vit.parameters())
    selection = Selection.from_scores(scores, count / base, base)
    ffn = sum(p.numel() for p in vit.blocks[4].mlp.parameters())
    third = f"{count - 64:,} ({(count - 64) / (2 * ffn):.1%})"
    block = f"{count - 64:,} ({(count - 64) / ffn:.1%})"

    heading, titles, _, *lines = str(selection).splitlines()
    share = f"{count:,} of {base:,} weights are selected ({count / base:.2%})"
    assert heading.startswith(share)
    assert titles.split() == ["blocks", "Q", "K", "V", "FFN", "all"]
    assert [line.split()[0] for line in lines] == ["0-1", "2-3", "4-5", "all"]
    assert third in lines[2] and "64 (" in lines[0] and lines[1].count("0 (0.0%)") == 5
    assert f"{count:,} (" in lines[3]
    lines = selection.table(by_block=True).splitlines()[2:]
    assert [line.split()[0] for line in lines] == [*"012345", "all"]
    assert block in lines[4] and lines[6].count(f"{count:,} (") == 1
    assert "64 (" in selection.table(64 / base).splitlines()[-1]


def test_overlap():
    a = Selection.from_scores(_scores([0.1, 0.9, 0.8, 0.2]), 0.5, 4)
    b = Selection.from_scores(_scores([0.9, 0.8, 0.1, 0.2]), 0.5, 4)
    assert overlap(a, a) == 1.0
    assert overlap(a, b) == 0.5


def test_refuses(tmp_path):
    with pytest.raises(ValueError, match="only 1 have a score above 0"):
        Selection.from_scores(_scores([0.0, 1.0]), 1.0, 2)
    with pytest.raises(ValueError, match="the scores of p1 hold negative or non-finite"):
        Selection.from_scores(_scores([1.0], [float("nan")]), 0.5, 2)
    selection = Selection.from_scores(_scores([0.5, 1.0]), 0.5, 2)
    with pytest.raises(ValueError, match="holds a share of 0.5: got 0.6"):
        selection.masks(0.6)


BLOCK = {
    "blocks.0.attn.qkv.weight": (6, 2),
    "blocks.0.attn.qkv.bias": (6,),
    "blocks.0.mlp.fc1.weight": (3, 2),
    "blocks.0.mlp.fc1.bias": (3,),
    "blocks.0.mlp.fc2.weight": (2, 3),
    "blocks.0.mlp.fc2.bias": (2,),
}
Q, K, V, FFN = (f"blocks.0.{kind}" for kind in ("Q", "K", "V", "FFN"))
BASE = 40  # neurons of 3, 3, 3 and 5 weights, 33 in all, and the two weights of the bias of fc2


def _neurons(share: float, seed: int = 0) -> Selection:
    units = Units("neuron", BLOCK)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        key: torch.rand(each.count, generator=generator) for key, each in units.groups.items()
    }
    return Selection.from_scores(scores, share, BASE, units)


def test_the_best_neurons_in_rank_order():
    units = Units("neuron", BLOCK)
    scores = {Q: [0.1, 0.9], K: [0.0, 0.3], V: [0.2, 0.2], FFN: [0.5, 0.0, 0.8]}
    scores = {key: torch.tensor(values) for key, values in scores.items()}
    # Neurons of 3, 5, 5 and 3 weights: 16.
    selection = Selection.from_scores(scores, 0.4, BASE, units)
    assert {key: index.tolist() for key, index in selection.indices.items()} == {
        Q: [1],
        K: [1],
        V: [],
        FFN: [2, 0],
    }
    assert {key: ranks.tolist() for key, ranks in selection.ranks.items()} == {
        Q: [0],
        K: [3],
        V: [],
        FFN: [1, 2],
    }
    # 0.3 of 40 are 12 weights; the third neuron would be 13.
    assert (selection.count(0.3), selection.weights(0.3)) == (2, 8)
    assert (selection.count(0.4), selection.weights(0.4)) == (4, 16)
    masks = selection.masks(0.3)
    assert masks["blocks.0.attn.qkv.weight"].any(1).tolist() == [0, 1, 0, 0, 0, 0]
    assert masks["blocks.0.attn.qkv.bias"].tolist() == [0, 1, 0, 0, 0, 0]
    assert masks["blocks.0.mlp.fc1.weight"].tolist() == [[0, 0], [0, 0], [1, 1]]
    assert masks["blocks.0.mlp.fc2.weight"].tolist() == [[0, 0, 1], [0, 0, 1]]
    assert not masks["blocks.0.mlp.fc2.bias"].any()
    fused = selection.slices("blocks.0.attn.qkv.weight")
    assert (fused.dim, fused.index.tolist(), fused.ranks.tolist()) == (0, [1, 3], [0, 3])
    column = selection.slices("blocks.0.mlp.fc2.weight")
    assert (column.dim, column.index.tolist(), column.ranks.tolist()) == (1, [2, 0], [1, 2])
    assert selection.prefix("blocks.0.mlp.fc2.weight", 0.4).tolist() == [2, 5, 0, 3]
    assert len(selection.slices("blocks.0.mlp.fc2.bias").index) == 0


def test_both_rows_of_a_gated_neuron_come_together():
    shapes = {"blocks.0.mlp.fc1.weight": (4, 2), "blocks.0.mlp.fc2.weight": (2, 2)}
    units = Units("neuron", shapes)
    selection = Selection.from_scores({FFN: torch.tensor([0.2, 0.4])}, 1.0, 12, units)
    gate = selection.slices("blocks.0.mlp.fc1.weight")
    assert (gate.dim, gate.index.tolist(), gate.ranks.tolist()) == (0, [1, 3, 0, 2], [0, 0, 1, 1])
    assert selection.masks(0.5)["blocks.0.mlp.fc1.weight"].any(1).tolist() == [0, 1, 0, 1]


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 2**20),
    st.sampled_from(["global", "layer"]),
    st.lists(st.floats(0, 33 / BASE), min_size=2, max_size=2).map(sorted),
)
def test_shares_of_neurons_are_nested_and_fall_short_by_less_than_a_unit(seed, allocation, shares):
    units = Units("neuron", BLOCK)
    generator = torch.Generator().manual_seed(seed)
    scores = {
        key: torch.randint(1, 4, (each.count,), generator=generator)
        for key, each in units.groups.items()
    }
    share, whole = shares[1], sum(each.count * each.size for each in units.groups.values())
    selection = Selection.from_scores(scores, share, BASE, units, allocation)
    small, large = (selection.masks(each) for each in shares)
    assert all((large[name] | ~small[name]).all() for name in BLOCK)
    for each, masks in zip(shares, (small, large), strict=True):
        held, most = sum(int(mask.sum()) for mask in masks.values()), int(each * BASE + 1e-6)
        assert held == selection.weights(each) <= most < min(held + 5, whole + 1)
        count = selection.count(each)
        ranks = torch.cat([ranks[ranks < count] for ranks in selection.ranks.values()])
        assert ranks.sort().values.tolist() == list(range(count))
    held = sum(len(ranks) for ranks in selection.ranks.values())
    assert held == selection.count(share)  # nothing is kept beyond the share
    again = Selection.from_scores(scores, shares[0], BASE, units, allocation)
    assert all(torch.equal(mask, small[name]) for name, mask in again.masks(shares[0]).items())


@pytest.mark.parametrize("steps", [False, True])
def test_neurons_round_trip(tmp_path, steps):
    selection = _neurons(0.5)
    if steps:
        selection.steps = {key: 0.5 + index for key, index in selection.indices.items()}
    selection.notes["made_by"] = "a test"
    selection.save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert (loaded.unit, loaded.share, loaded.base, loaded.shapes) == ("neuron", 0.5, BASE, BLOCK)
    assert loaded.notes == {"made_by": "a test"}
    assert (loaded.steps is None) == (not steps)
    for part in ("indices", "ranks", *(["steps"] if steps else [])):
        own, other = getattr(selection, part), getattr(loaded, part)
        assert list(own) == list(other)
        assert all(torch.equal(own[key], other[key]) for key in own)
    for share in (0.0, 0.2, 0.5):
        masks, again = selection.masks(share), loaded.masks(share)
        assert all(torch.equal(masks[name], again[name]) for name in BLOCK)


WEIGHTS_HEADER = (
    '{"share": 0.2, "base": 20, "shapes": {"blocks.0.mlp.fc1.weight": [3, 4], '
    '"blocks.0.mlp.fc1.bias": [3]}}'
)


def test_a_file_of_weights_from_before_neurons_loads_and_is_written_alike(tmp_path):
    old = tmp_path / "old.safetensors"
    weight, bias = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc1.bias"
    tensors = {
        f"indices/{weight}": torch.tensor([7, 0, 11]),
        f"indices/{bias}": torch.tensor([1]),
        f"ranks/{weight}": torch.tensor([1, 2, 3]),
        f"ranks/{bias}": torch.tensor([0]),
    }
    metadata = {"format": "fishertune_selection_v1", "header": WEIGHTS_HEADER, "notes": "{}"}
    save_file(tensors, old, metadata=metadata)
    loaded = Selection.load(old)
    assert (loaded.unit, loaded.count(0.2), loaded.weights(0.2)) == ("weight", 4, 4)
    assert loaded.masks(0.1)[weight].flatten().nonzero().flatten().tolist() == [7]
    assert loaded.masks(0.1)[bias].tolist() == [False, True, False]
    loaded.save(tmp_path / "new.safetensors")
    with safe_open(tmp_path / "new.safetensors", "pt") as new:
        assert new.metadata() == metadata
        assert {name: new.get_tensor(name).tolist() for name in tensors} == {
            name: tensor.tolist() for name, tensor in tensors.items()
        }


def _entries(**changes) -> dict[str, torch.Tensor]:
    """Tensors of a file that selects Q's second neuron, and FFN's third and first."""
    index = {Q: [1], K: [], V: [], FFN: [2, 0]} | changes.get("index", {})
    ranks = {Q: [0], K: [], V: [], FFN: [1, 2]} | changes.get("ranks", {})
    tensors = {f"indices/{key}": value for key, value in index.items()}
    tensors |= {f"ranks/{key}": value for key, value in ranks.items()}
    entries = {key: torch.tensor(value, dtype=torch.int64) for key, value in tensors.items()}
    steps = changes.get("steps", {}).items()
    return entries | {f"steps/{key}": torch.tensor(value) for key, value in steps}


def _without(*names: str) -> dict:
    return {name: shape for name, shape in BLOCK.items() if name not in names}


STEPS = {Q: [1.0], K: [], V: [], FFN: [0.5, 2.0]}
FC1, FC2 = "blocks.0.mlp.fc1.weight", "blocks.0.mlp.fc2.weight"
DAMAGED = {
    "unknown unit 'head': choose from": ({"unit": "head"}, {}),
    r"unknown unit \['neuron'\]": ({"unit": ["neuron"]}, {}),
    "tensors are not those of its header: indices/blocks.0": ({"unit": "weight"}, {}),
    "not those of its header: indices/blocks.0.K differs": (
        {"shapes": _without("blocks.0.attn.qkv.weight", "blocks.0.attn.qkv.bias")},
        {},
    ),
    "the shape of .*fc2.weight is .2, -3., which no": ({"shapes": {**BLOCK, FC2: (2, -3)}}, {}),
    "fc2.weight is no matrix, so the hidden": ({"shapes": {**BLOCK, FC2: ()}}, {}),
    "fc2.weight is no matrix, so": ({"shapes": _without(FC2)}, {}),
    "qkv.bias has 1 neurons, but other": (
        {"shapes": {**BLOCK, "blocks.0.attn.qkv.bias": (3,)}},
        {},
    ),
    "fc1.weight has 4 rows, which are not those of 3": ({"shapes": {**BLOCK, FC1: (4, 2)}}, {}),
    "FFN has 3 entries, and entry 3 is selected": ({}, {"index": {FFN: [3, 0]}}),
    "an entry of blocks.0.FFN is selected twice": ({}, {"index": {FFN: [2, 2]}}),
    "ranks of blocks.0.FFN do not ascend": ({}, {"ranks": {FFN: [2, 1]}}),
    "its ranks are not the numbers from 0 to 2": ({}, {"ranks": {FFN: [1, 3]}}),
    "not those of its header: steps/blocks.0.FFN differs": ({}, {"steps": {Q: [1.0]}}),
    "steps of blocks.0.FFN are torch.float32 of shape .1,., not float32 of shape .2,.": (
        {},
        {"steps": STEPS | {FFN: [1.0]}},
    ),
    "steps of blocks.0.Q hold negative": ({}, {"steps": STEPS | {Q: [-1.0]}}),
    "steps of blocks.0.Q hold .*non-finite": ({}, {"steps": STEPS | {Q: [torch.inf]}}),
    "holds 13 weights in 3 neurons, but .* 0.3 of 40 is 12": ({"share": 0.3}, {}),
    "holds 13 weights in 3 neurons, but .* 0.45 of 40 is 18": ({"share": 0.45}, {}),
}


@pytest.mark.parametrize("trouble", DAMAGED)
def test_a_damaged_file_of_neurons_is_refused_by_name(tmp_path, trouble):
    file = tmp_path / "selection.safetensors"

    def write(header: dict, entries: dict) -> None:
        header = {"share": 0.4, "base": BASE, "shapes": BLOCK, "unit": "neuron"} | header
        texts = {"format": "fishertune_selection_v1", "notes": "{}", "header": json.dumps(header)}
        save_file(_entries(**entries), file, metadata=texts)

    write({}, {})
    assert Selection.load(file).weights(0.4) == 13
    write(*DAMAGED[trouble])
    with pytest.raises(ValueError, match=f"selection.safetensors cannot be used: .*{trouble}"):
        Selection.load(file)


def test_a_number_is_no_part_of_a_layer(tmp_path):
    scores = {"blocks.0.attn.q_bias": torch.tensor(2.0), "blocks.0.attn.v_bias": torch.ones(3)}
    selection = Selection.from_scores(scores, 0.5, 4)
    assert selection.masks(0.25)["blocks.0.attn.q_bias"].item() is True
    assert selection.group_sizes() == {("V", 0): 3}
    assert selection.summary()["V", 0] == 1
    selection.save(tmp_path / "selection.safetensors")
    assert Selection.load(tmp_path / "selection.safetensors").count(0.5) == 2


def test_overlap_of_weights_and_neurons_counts_weights():
    neurons = _neurons(0.5)
    generator = torch.Generator().manual_seed(3)
    scores = {name: torch.rand(shape, generator=generator) for name, shape in BLOCK.items()}
    weights = Selection.from_scores(scores, 0.4, BASE)
    for a, b in ((neurons, weights), (weights, neurons), (neurons, _neurons(0.6, seed=1))):
        own, other = a.masks(a.share), b.masks(b.share)
        both = sum(int((own[name] & other[name]).sum()) for name in BLOCK)
        assert 0 < both < sum(int(mask.sum()) for mask in own.values())
        assert overlap(a, b) == both / sum(int(mask.sum()) for mask in own.values())


def test_refuses_scores_of_other_units():
    units = Units("neuron", BLOCK)
    scores = {name: torch.ones(shape) for name, shape in BLOCK.items()}
    with pytest.raises(ValueError, match="not those of the units 'neuron': blocks.0.FFN is only"):
        Selection.from_scores(scores, 0.5, BASE, units)
    means = units.mean(scores)
    with pytest.raises(ValueError, match="asks for 34 weights, but only 33 have a score above 0"):
        Selection.from_scores(means, 0.85, BASE, units)
