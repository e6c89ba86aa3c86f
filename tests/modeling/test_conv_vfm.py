"""ConvNeXts as foundation models: maps, candidates, Eq. 6, weights, methods that refuse them."""

import timm
import torch
from pytest import fixture, mark, raises
from safetensors.torch import save_file

from fishertune_d2.config import default_config
from fishertune_d2.fisher import (
    StatisticsPerturbation,
    Units,
    estimate_fisher,
    find_candidates,
)
from fishertune_d2.modeling import VFMBackbone
from fishertune_d2.tuning import build_tuning_method

DEPTHS = (1, 2, 4, 2)  # of tiny_convnext's stages
WIDTHS = (24, 32, 48, 64)


def build(name: str = "tiny_convnext", weights: str = "random", **options) -> VFMBackbone:
    torch.manual_seed(0)
    sizes = {"img_size": (64, 64), "patch_size": 16}
    return VFMBackbone(name=name, weights=weights, **sizes, **options).eval()


@fixture
def backbone() -> VFMBackbone:
    """The tiny ConvNeXt with random weights, none equal."""
    found = build()
    for parameter in found.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return found


def test_the_published_model_has_clouds_trunk_and_its_pointwise_layers():
    with torch.device("meta"):
        backbone = build("convnext_clip_large")
        public = timm.create_model("convnext_large_mlp.clip_laion2b_ft_soup_320", num_classes=768)
    # CLOUDS counts 199.77 M with the layers that lead to CLIP's space, the last without a bias.
    whole = sum(p.numel() for p in public.parameters()) - 768
    head = sum(p.numel() for p in public.head.parameters()) - 768
    assert round(whole / 1e6, 2) == 199.77
    assert sum(p.numel() for p in backbone.parameters()) == whole - head == 196_227_264
    candidates = find_candidates(backbone)
    assert {c.kind for c in candidates} == {"FFN"}
    blocks = [c.block for c in candidates]
    assert blocks == sorted(blocks) and set(blocks) == set(range(36))
    widths = (192, 384, 768, 1536)
    expected = sum(
        depth * (8 * d * d + 5 * d) for depth, d in zip((3, 3, 27, 3), widths, strict=True)
    )
    assert sum(c.numel for c in candidates) == expected
    maps = backbone(torch.zeros(1, 3, 301, 417, device="meta"))
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        "res2": (1, 192, 76, 105),
        "res3": (1, 384, 38, 53),
        "res4": (1, 768, 19, 27),
        "res5": (1, 1536, 10, 14),
    }


@mark.parametrize("size", [(64, 64), (48, 160), (75, 101)])
def test_the_maps_are_those_of_timms_stages(backbone, size):
    images = torch.randn(2, 3, *size)
    outputs = []
    for stage in backbone.vit.stages:
        stage.register_forward_hook(lambda module, args, out: outputs.append(out))
    with torch.no_grad():
        maps = backbone(images)
        seen = [outputs.pop(0) for _ in range(4)]
        bottom, right = (-side % 32 for side in size)
        padded = torch.nn.functional.pad(images, (0, right, 0, bottom))
        backbone.vit.forward_features(padded)
    for i, (first, again) in enumerate(zip(seen, outputs, strict=True)):
        got = maps[f"res{i + 2}"]
        assert torch.equal(first, again)
        assert torch.equal(got, first[..., : got.shape[2], : got.shape[3]])
        assert got.shape == (2, WIDTHS[i], *(-(-side // 2 ** (i + 2)) for side in size))
    shapes = backbone.output_shape()
    assert [shapes[f"res{i}"].channels for i in range(2, 6)] == list(WIDTHS)


def test_every_parameter_gets_a_gradient(backbone):
    sum(m.square().sum() for m in backbone(torch.randn(1, 3, 64, 64)).values()).backward()
    assert all(p.grad is not None for p in backbone.parameters())
    assert backbone.unused_parameters() == set()


def test_blocks_are_counted_through_the_stages(backbone):
    found = {c.name: c.block for c in find_candidates(backbone)}
    first = 0
    for stage, depth in enumerate(DEPTHS):
        for block in range(depth):
            for layer in ("fc1", "fc2"):
                assert found[f"vit.stages.{stage}.blocks.{block}.mlp.{layer}.weight"] == (
                    first + block
                )
        first += depth
    assert len(found) == 4 * sum(DEPTHS)


def test_the_shift_of_eq_6_acts_on_channels_of_maps(backbone):
    images, outputs = torch.randn(3, 3, 64, 96), []
    points = backbone.perturbation_points()
    blocks = [block for stage in backbone.vit.stages for block in stage.blocks]
    assert points == [backbone.vit.stem, blocks[2], blocks[3], blocks[5]]

    def shifted(strength):
        shift = StatisticsPerturbation(points, channels_first=True, strength=strength)
        torch.manual_seed(0)
        with torch.no_grad(), shift.drawing():
            return backbone(images)

    with torch.no_grad():
        plain = backbone(images)
    points[0].register_forward_hook(lambda module, args, out: outputs.append(out))
    same = shifted(0.0)
    outputs.clear()
    moved = shifted(1.0)
    assert all(torch.equal(same[name], plain[name]) for name in plain)
    assert not any(torch.allclose(moved[name], plain[name]) for name in plain)
    # An affine change of each channel of each image, so that its pattern stays.
    before = backbone.vit.stem[1](backbone.vit.stem[0](images)).detach()
    shift = StatisticsPerturbation([backbone.vit.stem], channels_first=True)
    torch.manual_seed(0)
    with torch.no_grad(), shift.drawing():
        after = backbone.vit.stem(images)
    standard = [
        (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True) for x in (before, after)
    ]
    torch.testing.assert_close(standard[0].abs(), standard[1].abs(), rtol=1e-3, atol=1e-3)
    assert not torch.allclose(before, after)


def test_fisher_of_a_batch_is_that_of_its_images(backbone):
    backbone, images = backbone.double(), torch.randn(3, 3, 64, 32, dtype=torch.float64)
    shift = StatisticsPerturbation(backbone.perturbation_points(), channels_first=True)

    def loss(model, batch):
        maps = model(torch.stack(batch)).values()
        return sum(m.tanh().flatten(1).mean(1) for m in maps)

    fast, slow = (
        estimate_fisher(
            backbone, [list(images)], loss, find_candidates(backbone), estimator=way, perturb=shift
        )
        for way in ("diagonal", "diagonal_loop")
    )
    assert len(fast) == 4 * sum(DEPTHS)
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-6, atol=1e-18)
        torch.testing.assert_close(fast.shifted[name], slow.shifted[name], rtol=1e-6, atol=1e-18)


def test_a_neuron_is_a_hidden_one_between_the_pointwise_layers(backbone):
    shapes = {c.name: tuple(c.parameter.shape) for c in find_candidates(backbone)}
    units = Units("neuron", shapes)
    assert len(units.groups) == len(units.layers) == sum(DEPTHS)
    values = {key: torch.zeros(group.count) for key, group in units.groups.items()}
    values["vit.stages.2.blocks.1.FFN"][7] = 1.0
    with torch.no_grad():
        for name, mask in units.spread(values).items():
            backbone.get_parameter(name)[mask.bool()] = 0.0
        seen = []
        mlp = backbone.vit.stages[2].blocks[1].mlp
        mlp.act.register_forward_hook(lambda module, args, out: seen.append(out))
        backbone(torch.randn(1, 3, 64, 64))
    assert (seen[0][..., 7] == 0).all() and (seen[0][..., 6] != 0).any()
    assert (mlp.fc2.weight[:, 7] == 0).all() and (mlp.fc2.weight[:, 6] != 0).all()
    assert units.groups["vit.stages.2.blocks.1.FFN"].size == 2 * 48 + 1


def test_timms_file_and_open_clips_are_read_and_others_refused(tmp_path):
    torch.manual_seed(3)
    public = timm.create_model("test_convnext", num_classes=10)
    state = public.state_dict()
    timms, clips, other = (str(tmp_path / f"{name}.safetensors") for name in "abc")
    save_file(state, timms)
    inside = {n: t for n, t in state.items() if not n.startswith("head.")}
    outside = {"visual.head.mlp.fc1.weight": torch.ones(8, 64), "text.token": torch.ones(3)}
    outside |= {"visual.head.mlp.fc1.bias": torch.ones(8), "logit_scale": torch.ones(())}
    outside |= {"visual.head.mlp.fc2.weight": torch.ones(4, 8)}
    save_file({f"visual.trunk.{n}": t for n, t in inside.items()} | outside, clips)
    for file in (timms, clips):
        found = build(weights=file).vit.state_dict()
        assert found.keys() == inside.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in inside.items())
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), other)
    with raises(ValueError, match="weights do not fit.*Missing: stem"):
        build(weights=other)
    with raises(ValueError, match="weights do not fit"):
        build(name="tiny", weights=timms)


def test_checkpointed_blocks_compute_the_same():
    images, results = torch.randn(2, 3, 64, 64), []
    for saving in (False, True):
        backbone = build(checkpoint_blocks=saving).train()
        sum(m.square().sum() for m in backbone(images).values()).backward()
        results.append([p.grad for p in backbone.parameters()])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


@mark.parametrize("method", ["rein", "set", "vpt", "vqt", "adaptformer", "soma"])
def test_methods_for_tokens_refuse_it(method):
    cfg = default_config()
    cfg.TUNING.METHOD = method
    with torch.device("meta"), raises(ValueError, match=f"METHOD {method} is made for the blocks"):
        build_tuning_method(cfg).attach(build())


def test_peft_tunes_the_pointwise_layers_and_merges(backbone):
    cfg = default_config()
    cfg.TUNING.METHOD = "lora"
    with raises(ValueError, match="names q_proj, v_proj: this backbone has fc1, fc2"):
        build_tuning_method(cfg).attach(build())
    cfg.TUNING.METHOD, cfg.TUNING.PEFT.TARGETS = "peft", ["fc1", "fc2"]
    cfg.TUNING.PEFT.TYPE, images = "LORA", torch.randn(1, 3, 64, 64)
    names = list(backbone.state_dict())
    method = build_tuning_method(cfg)
    method.attach(backbone)
    tuned = method.parameters(backbone)
    assert len(tuned) == 2 * 2 * sum(DEPTHS)
    for parameter in tuned.values():
        parameter.data.normal_()
    expected = backbone(images)
    method.merge(backbone)
    assert sorted(backbone.state_dict()) == sorted(names)
    for name, features in backbone(images).items():
        torch.testing.assert_close(features, expected[name], rtol=1e-3, atol=1e-3)


@mark.parametrize(("name", "depth"), [("tiny", 6), ("tiny_convnext", 9)])
def test_thirds_are_the_blocks_that_eq_6_perturbs(name, depth):
    backbone = VFMBackbone(name=name, weights="random", img_size=(64, 64), patch_size=0)
    blocks = backbone.family.blocks(backbone.vit)
    assert len(blocks) == depth
    assert backbone.thirds == [depth // 3 - 1, depth // 2 - 1, 2 * depth // 3 - 1]
    assert backbone.perturbation_points()[1:] == [blocks[i] for i in backbone.thirds]
