"""What every family of foundation models must do, on tiny models of each."""

import torch
from pytest import mark

from fishertune_d2.fisher import StatisticsPerturbation, estimate_fisher, find_candidates
from fishertune_d2.modeling.vfm import VFMS

STRIDE_OF = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


@mark.parametrize("size", [(64, 64), (48, 160), (75, 101)])
def test_any_size_gives_a_pyramid(family, small, size):
    backbone = small(family, patch_size=16, img_size=(64, 64))
    with torch.no_grad():
        maps = backbone(torch.randn(2, 3, *size))
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        name: (2, 64, -(-size[0] // s), -(-size[1] // s)) for name, s in STRIDE_OF.items()
    }
    assert all(m.isfinite().all() for m in maps.values())


def test_maps_are_the_patches_of_the_tapped_blocks(family, small):
    backbone, image = small(family), torch.randn(1, 3, 42, 56)
    outputs = {}
    for i, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: outputs.update({i: out}))
    maps = backbone.vit.forward_intermediates(image, indices=backbone.taps, intermediates_only=True)
    assert backbone.taps == list(VFMS[family].taps or (1, 2, 3, 5))
    for tap, got in zip(backbone.taps, maps, strict=True):
        raw = outputs[tap].reshape(1, -1, 64)[:, backbone.num_prefix_tokens :]
        torch.testing.assert_close(got.flatten(2).mT, raw, rtol=0, atol=0)


def test_positions_are_told_apart(family, small):
    """Without them, and with symmetric kernels, a mirrored image would give mirrored maps."""
    vit = small(family).vit
    kernel = vit.patch_embed.proj.weight
    kernel.data = (kernel + kernel.flip(3)) / 2
    image = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        map_of, mirrored = (
            vit.forward_intermediates(x, indices=[5], intermediates_only=True)[0]
            for x in (image, image.flip(3))
        )
    assert not torch.allclose(map_of, mirrored.flip(3), rtol=1e-2, atol=1e-2)


def test_unused_parameters_are_those_without_a_gradient(family, small):
    backbone = small(family)
    sum(m.square().sum() for m in backbone(torch.randn(1, 3, 70, 70)).values()).backward()
    without = {name for name, p in backbone.named_parameters() if p.grad is None}
    assert backbone.unused_parameters() == without
    # A final norm, or nothing: SAM's neck is left out.
    assert len(without) == (0 if family == "sam_vith" else 2)


def test_the_shift_of_eq_6_applies(family, small):
    backbone, images = small(family), torch.randn(3, 3, 42, 70)
    outputs = []
    points = backbone.perturbation_points()
    assert points[1:] == [backbone.vit.blocks[i] for i in (1, 2, 3)]
    for point in points:
        point.register_forward_hook(lambda m, args, out: outputs.append(out))

    def shifted(strength):
        outputs.clear()
        shift = StatisticsPerturbation(
            points, num_prefix_tokens=backbone.num_prefix_tokens, strength=strength
        )
        torch.manual_seed(0)
        with torch.no_grad(), shift.drawing():
            maps = backbone(images)
        return maps, list(outputs)

    with torch.no_grad():
        plain = backbone(images)
    same, _ = shifted(0.0)
    moved, after = shifted(1.0)
    for name, expected in plain.items():
        torch.testing.assert_close(same[name], expected, rtol=0, atol=0)
        assert not torch.allclose(moved[name], expected) and moved[name].isfinite().all()
    # 3 x 5 patches, behind the prefix where there is one.
    tokens = [out.reshape(3, -1, 64).shape[1] for out in after]
    assert tokens == [15] + 3 * [15 + backbone.num_prefix_tokens]


def test_fisher_of_a_batch_is_that_of_its_images(family, small):
    """Also where windows are folded into the batch, and with Eq. 6 at the family's own points."""
    backbone, images = small(family).double(), torch.randn(3, 3, 42, 70, dtype=torch.float64)
    shift = StatisticsPerturbation(
        backbone.perturbation_points(), num_prefix_tokens=backbone.num_prefix_tokens
    )

    def loss(model, batch):
        maps = model(torch.stack(batch)).values()
        return sum(m.tanh().flatten(1).mean(1) for m in maps)

    fast, slow = (
        estimate_fisher(
            backbone, [list(images)], loss, find_candidates(backbone), estimator=way, perturb=shift
        )
        for way in ("diagonal", "diagonal_loop")
    )
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-6, atol=1e-18)
        torch.testing.assert_close(fast.shifted[name], slow.shifted[name], rtol=1e-6, atol=1e-18)


def test_quick_gelu_is_clips(small):
    mlp = small("clip_vitl").vit.blocks[0].mlp
    x = torch.linspace(-3, 3, 7)
    torch.testing.assert_close(mlp.act(x), x * torch.sigmoid(1.702 * x))
