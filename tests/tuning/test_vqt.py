"""Queries beside the image's tokens, against blocks written out."""

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
    """Returns a function that builds a family's tiny model with three queries in each block."""

    def build(family: str, noise: float = 0.1):
        """``noise`` moves the linear layer away from 0."""
        method, backbone = build_method("vqt", TUNING__VQT__NUM_TOKENS=3), small(family)
        backbone.requires_grad_(False)
        method.attach(backbone)
        backbone.vqt.weight.data += noise * torch.randn_like(backbone.vqt.weight)
        return method, backbone

    return build


@pytest.mark.parametrize("family", ["dinov2_vitl_reg", "clip_vitl", "dinov3_vitl", "eva02_vitl"])
def test_queries_ask_and_are_not_asked(family, attached, walk, attention_by_hand, mlp_by_hand):
    _, backbone = attached(family)
    backbone.double()
    summaries = []

    def block(i, module, x, rope):
        queries = backbone.vqt.prompts[i].expand(2, 3, 64)
        count, patches = x.shape[1], slice(backbone.num_prefix_tokens, x.shape[1])
        both = torch.cat([x, queries], dim=1)  # keys and values from what was there before
        both = mlp_by_hand(module, attention_by_hand(module, both, rope, patches, slice(0, count)))
        summaries.append(both[:, count:].mean(dim=1))
        return both[:, :count]

    maps = walk(backbone, IMAGES.double(), block)
    for j, (first, last) in enumerate([(0, 1), (2, 2), (3, 3), (4, 5)]):
        summary = sum(summaries[first : last + 1]) / (last + 1 - first)
        maps[j] = maps[j] + (backbone.vqt.weight @ summary.T).T[:, :, None, None]
    expected, got = build_pyramid(maps, 14, (42, 56)), backbone(IMAGES.double())
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value)


def test_a_decoder_may_read_fewer_maps_in_any_order(small, build_method):
    """Each map gets the blocks after the one before it, whatever the order of OUT_FEATURES."""
    backbone = small("dinov2_vitl", out_features=["res5", "block3"])
    method = build_method("vqt", TUNING__VQT__NUM_TOKENS=3)
    method.attach(backbone)
    plain = {name: value.detach() for name, value in backbone(IMAGES).items()}
    backbone.vqt.weight.data += 0.1 * torch.randn_like(backbone.vqt.weight)
    outputs, places = [], slice(backbone.vqt.start, backbone.vqt.start + 3)
    for block in backbone.vit.blocks:  # before the queries are removed
        note = lambda block, args, x: outputs.append(x[:, places].mean(dim=1))  # noqa: E731
        block.register_forward_hook(note, prepend=True)
    maps = backbone(IMAGES)
    assert list(maps) == ["res5", "block3"]
    for name, layers in (("block3", (0, 1, 2)), ("res5", (3, 4, 5))):
        summary = sum(outputs[layer] for layer in layers) / 3
        added = (summary @ backbone.vqt.weight.T)[:, :, None, None]
        torch.testing.assert_close(maps[name], plain[name] + added)
    sum(value.sum() for value in maps.values()).backward()
    assert all(p.grad is not None for p in method.parameters(backbone).values())


def test_nothing_is_added_at_first(small_family, small, attached):
    if small_family == "sam_vith":
        with pytest.raises(ValueError, match="METHOD vqt adds tokens .* see windows"):
            attached(small_family)
        return
    plain, (_, backbone) = small(small_family), attached(small_family, noise=0.0)
    with torch.no_grad():
        expected, got = plain(IMAGES), backbone.train()(IMAGES)
    for name, value in expected.items():  # attention with a mask rounds in another order
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["dinov2_vitl", "eva02_clip_vitl"])
def test_queries_alone_are_trained_and_all_of_them(family, attached):
    method, backbone = attached(family)
    sum(m.square().sum() for m in backbone(IMAGES).values()).backward()
    reached = {name for name, p in backbone.named_parameters() if p.grad is not None}
    parameters = method.parameters(backbone)
    assert reached == set(parameters)
    assert len(parameters) == 7 and all(p.grad.abs().sum() > 0 for p in parameters.values())


def test_the_gradient_of_a_query_stays_in_its_block(attached):
    """What is cut off for speed carries none: the gradients are those of the whole graph."""
    _, backbone = attached("dinov2_vitl")
    backbone.double()
    backbone.vit.requires_grad_(True)  # so that a graph through earlier blocks would be there
    backbone(IMAGES.double())["res5"].square().sum().backward()
    prompts = backbone.vqt.prompts
    assert [p.grad is not None for p in prompts] == [False] * 4 + [True] * 2
    step, at = 1e-6, (1, 5)
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            prompts[4][at] += sign * step
            values.append(backbone(IMAGES.double())["res5"].square().sum())
            prompts[4][at] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    torch.testing.assert_close(prompts[4].grad[at], slope, rtol=1e-5, atol=1e-7)


def test_a_copy_has_queries_of_its_own(attached):
    _, backbone = attached("eva02_vitl")
    before = backbone(IMAGES)["res5"]
    other = copy.deepcopy(backbone)
    for parameter in other.vqt.parameters():
        parameter.data += 1
    assert torch.equal(backbone(IMAGES)["res5"], before)
    assert not torch.allclose(other(IMAGES)["res5"], before)
    other.load_state_dict(backbone.state_dict())
    assert torch.equal(other(IMAGES)["res5"], before)


def test_the_count(build_method):
    cfg = default_config()
    backbone, method = build_empty(cfg, build_backbone), build_method("vqt")
    method.attach(backbone)
    count = sum(p.numel() for p in method.parameters(backbone).values())
    assert count == 24 * 80 * 1024 + 1024**2 == 3_014_656


def test_what_cannot_be_done_is_said(attached, build_method):
    method, backbone = attached("mae_vitl")
    with pytest.raises(ValueError, match="vqt cannot be merged: queries are tokens"):
        method.merge(backbone)
    with pytest.raises(ValueError, match="TUNING.VQT.NUM_TOKENS is 0: choose above 0"):
        build_method("vqt", TUNING__VQT__NUM_TOKENS=0).attach(backbone)
