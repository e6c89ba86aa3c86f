"""A bottleneck beside each MLP, against blocks written out."""

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
    """Returns a function that builds a family's tiny model with bottlenecks of 4 channels."""

    def build(family: str, noise: float = 0.1):
        """``noise`` moves the bottlenecks away from where they start."""
        method, backbone = build_method("adaptformer", TUNING__ADAPTFORMER__DIM=4), small(family)
        backbone.requires_grad_(False)
        method.attach(backbone)
        for parameter in method.parameters(backbone).values():
            parameter.data += noise * torch.randn_like(parameter)
        return method, backbone

    return build


@pytest.mark.parametrize("family", ["dinov2_vitl_reg", "eva02_vitl"])
def test_a_bottleneck_adds_to_the_mlp(family, attached, walk, attention_by_hand, mlp_by_hand):
    _, backbone = attached(family)
    backbone.double()
    weights = backbone.adaptformer.state_dict()

    def block(i, module, x, rope):
        patches = slice(backbone.num_prefix_tokens, None)
        stream = attention_by_hand(module, x, rope, patches, slice(None))
        hidden = stream @ weights[f"down.{i}.weight"].T + weights[f"down.{i}.bias"]
        added = hidden.clamp_min(0) @ weights[f"up.{i}.weight"].T + weights[f"up.{i}.bias"]
        return mlp_by_hand(module, stream) + 0.1 * added

    expected = build_pyramid(walk(backbone, IMAGES.double(), block), 14, (42, 56))
    maps = backbone(IMAGES.double())
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value)


def test_nothing_is_added_at_first(small_family, small, attached):
    backbones = small(small_family), attached(small_family, noise=0.0)[1].train()
    with torch.no_grad():
        plain, maps = (backbone(IMAGES) for backbone in backbones)
    assert all(torch.equal(maps[name], plain[name]) for name in plain)


def test_bottlenecks_alone_are_trained_and_all_of_them(small_family, attached):
    method, backbone = attached(small_family)
    sum(m.square().sum() for m in backbone(IMAGES).values()).backward()
    reached = {name for name, p in backbone.named_parameters() if p.grad is not None}
    parameters = method.parameters(backbone)
    assert reached == set(parameters)
    assert len(parameters) == 6 * 4 and all(p.grad.abs().sum() > 0 for p in parameters.values())


def test_dropout_is_for_training(attached):
    _, backbone = attached("mae_vitl", noise=1.0)
    first, again = (backbone.train()(IMAGES)["res5"] for _ in range(2))
    assert not torch.equal(first, again)
    first, again = (backbone.eval()(IMAGES)["res5"] for _ in range(2))
    assert torch.equal(first, again)


def test_a_copy_has_bottlenecks_of_its_own(attached):
    _, backbone = attached("dinov3_vitl")
    before = backbone(IMAGES)["res5"]
    other = copy.deepcopy(backbone)
    for parameter in other.adaptformer.parameters():
        parameter.data += 1
    assert torch.equal(backbone(IMAGES)["res5"], before)
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(IMAGES)["res5"], before)


def test_the_papers_count(build_method):
    cfg = default_config()
    backbone, method = build_empty(cfg, build_backbone), build_method("adaptformer")
    method.attach(backbone)
    assert sum(p.numel() for p in method.parameters(backbone).values()) == 3_171_840


def test_what_cannot_be_done_is_said(attached, build_method):
    method, backbone = attached("mae_vitl")
    with pytest.raises(ValueError, match="adaptformer cannot be merged: a bottleneck with a ReLU"):
        method.merge(backbone)
    with pytest.raises(ValueError, match="TUNING.ADAPTFORMER.DIM is 0: choose above 0"):
        build_method("adaptformer", TUNING__ADAPTFORMER__DIM=0).attach(backbone)
