"""Prompts in every block, against blocks written out."""

import copy

import pytest
import torch
from detectron2.modeling import build_backbone

from fishertune_d2.config import default_config
from fishertune_d2.engine.parameter_counts import build_empty
from fishertune_d2.modeling.pyramid import build_pyramid

IMAGES = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def attached(small, build_method):
    """Returns a function that builds a family's tiny model with three prompts in each block."""

    def build(family: str):
        method, backbone = build_method("vpt", TUNING__VPT__NUM_TOKENS=3), small(family)
        names = set(backbone.state_dict())
        method.attach(backbone)
        assert names < set(backbone.state_dict())
        backbone.requires_grad_(False)
        for parameter in method.parameters(backbone).values():
            parameter.requires_grad_(True)
        return method, backbone

    return build


@pytest.mark.parametrize("family", ["dinov2_vitl_reg", "clip_vitl", "dinov3_vitl", "eva02_vitl"])
def test_a_block_sees_its_own_prompts_and_no_others(
    family, attached, walk, attention_by_hand, mlp_by_hand
):
    _, backbone = attached(family)
    backbone.double()
    prefix = backbone.num_prefix_tokens

    def block(i, module, x, rope):
        prompts = backbone.vpt.prompts[i].expand(2, 3, 64)
        x = torch.cat([x[:, :prefix], prompts, x[:, prefix:]], dim=1)
        x = attention_by_hand(module, x, rope, slice(prefix + 3, None), slice(None))
        x = mlp_by_hand(module, x)
        return torch.cat([x[:, :prefix], x[:, prefix + 3 :]], dim=1)

    expected = build_pyramid(walk(backbone, IMAGES.double(), block), 14, (42, 56))
    maps = backbone(IMAGES.double())
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value)


def test_prompts_alone_are_trained_and_all_of_them(small_family, attached):
    if small_family == "sam_vith":
        with pytest.raises(ValueError, match="VisionTransformerSAM see windows"):
            attached(small_family)
        return
    method, backbone = attached(small_family)
    maps = backbone(IMAGES)
    assert maps["res4"].shape == (2, 64, 3, 4)
    sum(m.square().sum() for m in maps.values()).backward()
    reached = {name for name, p in backbone.named_parameters() if p.grad is not None}
    assert reached == set(method.parameters(backbone)) == {f"vpt.prompts.{i}" for i in range(6)}
    assert all(p.grad.abs().sum() > 0 for p in method.parameters(backbone).values())


def test_a_copy_has_prompts_of_its_own(attached):
    _, backbone = attached("eva02_vitl")
    before = backbone(IMAGES)["res5"]
    other = copy.deepcopy(backbone)
    for prompts in other.vpt.prompts:
        prompts.data += 1
    assert torch.equal(backbone(IMAGES)["res5"], before)
    assert not torch.allclose(other(IMAGES)["res5"], before)
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(IMAGES)["res5"], before)


def test_the_papers_count(build_method):
    cfg = default_config()
    backbone = build_empty(cfg, build_backbone)
    method = build_method("vpt")
    method.attach(backbone)
    assert sum(p.numel() for p in method.parameters(backbone).values()) == 3_686_400


def test_prompts_start_as_the_authors_do(attached):
    _, backbone = attached("dinov2_vitl")
    numbers = torch.cat([p.flatten() for p in backbone.vpt.prompts]).abs()
    bound = (6 / (3 * 14 * 14 + 64)) ** 0.5
    assert 0.95 * bound < numbers.max() <= bound
    assert numbers.mean().item() == pytest.approx(bound / 2, rel=0.1)


def test_what_cannot_be_done_is_said(attached, build_method):
    method, backbone = attached("mae_vitl")
    with pytest.raises(ValueError, match="vpt cannot be merged: prompts are tokens"):
        method.merge(backbone)
    with pytest.raises(ValueError, match="TUNING.VPT.NUM_TOKENS is 0: choose above 0"):
        build_method("vpt", TUNING__VPT__NUM_TOKENS=0).attach(backbone)
