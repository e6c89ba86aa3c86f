"""CLIP's embeddings and the raw maps of a backbone (MODEL.VFM.OUT_FEATURES)."""

from dataclasses import replace

import torch
from pytest import fixture, mark, raises

from fishertune_d2.engine.vit import require_nothing_around
from fishertune_d2.modeling.text_tower import TextTower
from fishertune_d2.modeling.vfm import BLOCKS, CLIP, PYRAMID, VFMS, VFMBackbone

from .test_public_files import eva02_clip

EVA = "eva02_clip_vitl_336"


def tiny(*features: str, seed: int = 0, **kwargs) -> VFMBackbone:
    torch.manual_seed(seed)
    kwargs = {"name": "tiny", "weights": "random", "img_size": (64, 64), "patch_size": 16} | kwargs
    return VFMBackbone(out_features=features or PYRAMID, **kwargs)


@fixture
def small_eva(monkeypatch) -> None:
    """EVA-CLIP with 6 blocks of 64 channels, and 64 channels of its embeddings."""
    options = {"dynamic_img_size": True, "embed_dim": 64, "depth": 6, "num_heads": 2}
    monkeypatch.setitem(VFMS, EVA, replace(VFMS[EVA], options=options, clip_dim=64))


@mark.parametrize("name", ["tiny", EVA])
def test_features_are_those_of_timm(name, small_eva):
    backbone = tiny(*PYRAMID, *BLOCKS, *CLIP, name=name).double().eval()
    images = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    got = backbone(images)
    vit = backbone.vit
    assert list(got) == [*PYRAMID, *BLOCKS, *CLIP]
    torch.testing.assert_close(got["clip_global"], vit(images))
    tokens = vit.forward_features(images)
    for i in range(4):
        for j in range(6):
            expected = vit.head(tokens[:, 1 + 6 * i + j])
            torch.testing.assert_close(got["clip_dense"][..., i, j], expected)
    maps = vit.forward_intermediates(
        images, indices=backbone.taps, norm=False, intermediates_only=True
    )
    for feature, expected in zip(BLOCKS, maps, strict=True):
        assert torch.equal(got[feature], expected)
    plain = tiny(name=name, weights="random").double().eval()
    plain.vit.load_state_dict(
        {name: value for name, value in vit.state_dict().items() if not name.startswith("head.")}
    )
    for feature, expected in plain(images).items():
        assert torch.equal(got[feature], expected)
    shapes = backbone.output_shape()
    for feature, value in got.items():
        assert shapes[feature].channels == value.shape[1]
        if value.ndim == 4:
            assert value.shape[2] == 64 // shapes[feature].stride


def test_images_of_other_sizes_are_padded_to_whole_patches():
    backbone = tiny("res2", "block3", "clip_dense")
    got = backbone(torch.randn(1, 3, 50, 70))
    assert {name: tuple(value.shape[-2:]) for name, value in got.items()} == {
        "res2": (13, 18),
        "block3": (4, 5),
        "clip_dense": (4, 5),
    }


def test_the_public_copy_is_no_part_of_the_model():
    backbone = tiny("block5", *CLIP)
    plain = tiny("block5", "clip_global")
    assert backbone.state_dict().keys() == plain.state_dict().keys()
    assert len([*backbone.parameters()]) == len([*plain.parameters()])
    assert len([*backbone.modules()]) == len([*plain.modules()])
    images = torch.randn(2, 3, 64, 64)
    backbone.eval()
    public = backbone(images)["clip_global"].detach()
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(0.1)
    got = backbone(images)
    assert not got["clip_global_frozen"].requires_grad and got["clip_global"].requires_grad
    torch.testing.assert_close(got["clip_global_frozen"], public)
    assert not torch.allclose(got["clip_global"], public)
    assert backbone.double()(images.double())["clip_global_frozen"].dtype == torch.float64
    with torch.no_grad():
        assert "clip_global_frozen" not in backbone(images.double())
        assert "clip_global_frozen" in backbone.train()(images.double())
    assert backbone.to("meta")(images.to("meta").double())["clip_global_frozen"].is_meta


@mark.parametrize("features", [PYRAMID, ("block2", "clip_global_frozen"), ("clip_global",), CLIP])
def test_parameters_without_a_gradient_are_unused(features):
    backbone = tiny(*features).train()
    loss = sum(value.square().sum() for value in backbone(torch.randn(1, 3, 64, 64)).values())
    loss.backward()
    without = {name for name, p in backbone.named_parameters() if p.grad is None}
    # Norms of maps that reach no loss: their blocks are behind the last map that is asked for.
    if features != ("block2", "clip_global_frozen"):
        assert without == backbone.unused_parameters()
    assert {name for name in without if "norm." in name or "head" in name} >= (
        backbone.unused_parameters()
    )


def test_both_towers_come_from_the_one_file_of_the_authors(tmp_path, small_eva):
    source = tiny(*CLIP, name=EVA).eval()
    for parameter in source.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    text = TextTower("tiny", "random")
    state = eva02_clip(source.vit)
    state |= {f"visual.{name}": source.vit.state_dict()[name] for name in ("head.weight",)}
    state = {name: value for name, value in state.items() if not name.startswith("text.")}
    state |= {f"text.{name}": value for name, value in text.text.state_dict().items()}
    file = tmp_path / "EVA02_CLIP.pt"
    torch.save(state, file)
    images = torch.randn(1, 3, 64, 64)
    got = tiny(*CLIP, name=EVA, weights=str(file), seed=1).eval()(images)
    for name, expected in source(images).items():
        if name != "clip_global_frozen":  # of random weights in `source`
            torch.testing.assert_close(got[name], expected)
    torch.testing.assert_close(got["clip_global_frozen"], got["clip_global"])
    copy = TextTower("tiny", str(file))
    assert torch.equal(copy.encode_texts(["road"]), text.encode_texts(["road"]))
    del state["visual.head.bias"]
    torch.save(state, file)
    with raises(ValueError, match="weights do not fit: .*Missing: head.bias"):
        tiny(*CLIP, name=EVA, weights=str(file))
    tiny(name=EVA, weights=str(file))  # without the embeddings the head is left out


def test_sizes_of_eva_clip():
    with torch.device("meta"):
        backbone = VFMBackbone(
            name=EVA, weights="random", img_size=(336, 336), patch_size=14, out_features=CLIP
        )
    assert sum(p.numel() for p in backbone.parameters()) == 304_432_832
    assert backbone.clip_dim == 768


def test_features_that_a_vfm_lacks_are_refused():
    with raises(ValueError, match="dinov2_vits does not have: .*eva02_clip_vitl_336, tiny have"):
        tiny(*CLIP, name="dinov2_vits")
    with raises(ValueError, match=r"OUT_FEATURES is \['res6'\]: choose from res2, res3"):
        tiny("res6")


def test_clips_head_is_not_taken_for_a_neck():
    model = torch.nn.ModuleDict({"backbone": tiny("res2", *CLIP)})
    require_nothing_around(model)
    model["backbone"].neck = torch.nn.Linear(2, 2)
    with raises(ValueError, match="6 weights around its ViT"):
        require_nothing_around(model)
