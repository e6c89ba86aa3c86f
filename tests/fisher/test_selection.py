import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fishertune_d2.fisher import Selection, find_candidates, overlap


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
