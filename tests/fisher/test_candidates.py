import pytest
import timm
import torch
from torch import nn

from fishertune_d2.fisher import KINDS, find_candidates


def _meta(name: str, **options) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, num_classes=0, **options)


def test_counts_of_a_vit_l():
    vit = _meta("vit_large_patch14_dinov2", img_size=512, patch_size=16)
    candidates = find_candidates(vit)
    # The paper's 304,199,680 counts the mask token of pretraining too, 1,024 numbers that no
    # forward pass of segmentation uses, and that timm leaves out.
    assert sum(p.numel() for p in vit.parameters()) == 304_199_680 - 1024
    assert sum(c.numel for c in candidates) == 277_020_672
    assert {c.block for c in candidates} == set(range(24))
    by_kind = {kind: sum(c.numel for c in candidates if c.kind == kind) for kind in KINDS}
    assert by_kind["Q"] == by_kind["K"] == by_kind["V"] == 24 * (1024 * 1024 + 1024)
    assert by_kind["FFN"] == 24 * (2 * 1024 * 4096 + 4096 + 1024)


@pytest.mark.parametrize(
    ("name", "count"),
    # EVA-02: without the norm inside its feed-forward network, which is no linear layer.
    [("eva02_large_patch14_224", 276_979_680), ("vit_huge_patch14_224", 577_044_480)],
)
def test_counts_of_other_vits(name, count):
    assert sum(c.numel for c in find_candidates(_meta(name))) == count


def test_fused_rows_are_the_projections():
    vit = timm.create_model("test_vit", num_classes=0)
    width = vit.embed_dim
    qkv = [c for c in find_candidates(vit) if c.name == "blocks.1.attn.qkv.weight"]
    assert [c.kind for c in qkv] == ["Q", "K", "V"]
    attention = vit.blocks[1].attn
    x = torch.randn(1, 3, width)
    q = (x @ qkv[0].parameter[qkv[0].rows].T) + attention.qkv.bias[:width]
    fused = attention.qkv(x).reshape(1, 3, 3, width)
    torch.testing.assert_close(q, fused[:, :, 0])


def test_candidates_cover_rows_once():
    vit = timm.create_model("test_vit", num_classes=0)
    for name, parameter in vit.named_parameters():
        covered = torch.zeros(parameter.shape[0])
        for candidate in find_candidates(vit):
            if candidate.name == name:
                covered[candidate.rows] += 1
        expected = 1.0 if (".qkv." in name or ".fc" in name) else 0.0
        assert (covered == expected).all(), name


def test_a_model_without_blocks_is_refused():
    with pytest.raises(ValueError, match="Linear has no parameter named blocks"):
        find_candidates(nn.Linear(2, 2))
