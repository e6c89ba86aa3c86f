import torch
import torch.nn.functional as F
from detectron2.modeling import build_backbone
from pytest import approx, mark, raises

from fishertune_d2.config import default_config
from fishertune_d2.modeling.pyramid import build_pyramid, resize_to_stride
from fishertune_d2.modeling.vfm import VFMBackbone

STRIDE_OF = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


def tiny(patch_size=16, img_size=(64, 64), **kwargs) -> VFMBackbone:
    torch.manual_seed(0)
    kwargs = {"name": "tiny", "weights": "random"} | kwargs
    return VFMBackbone(patch_size=patch_size, img_size=img_size, **kwargs).eval()


def on_meta(**kwargs) -> VFMBackbone:
    with torch.device("meta"):
        return tiny(**kwargs)


def test_built_by_name_from_a_config():
    cfg = default_config()
    cfg.MODEL.VFM.NAME, cfg.MODEL.VFM.WEIGHTS = "tiny", "random"
    cfg.MODEL.VFM.IMG_SIZE, cfg.MODEL.VFM.PATCH_SIZE = [64, 96], 8
    backbone = build_backbone(cfg)
    assert isinstance(backbone, VFMBackbone)
    assert backbone.size_divisibility == 8
    assert backbone.vit.patch_embed.grid_size == (8, 12)
    assert {k: (s.channels, s.stride) for k, s in backbone.output_shape().items()} == {
        name: (64, stride) for name, stride in STRIDE_OF.items()
    }


@mark.parametrize("patch_size", [14, 16])
@mark.parametrize("size", [(64, 64), (64, 128), (210, 280), (37, 51), (5, 300)])
def test_maps_cover_the_image_at_their_stride(size, patch_size):
    with torch.no_grad():
        maps = tiny(patch_size)(torch.randn(2, 3, *size))
    assert {name: tuple(m.shape) for name, m in maps.items()} == {
        name: (2, 64, -(-size[0] // s), -(-size[1] // s)) for name, s in STRIDE_OF.items()
    }
    assert all(m.isfinite().all() for m in maps.values())


def test_maps_are_raw_outputs_of_the_tapped_blocks():
    backbone, image = tiny(), torch.randn(1, 3, 64, 96)
    outputs = {}
    for i, block in enumerate(backbone.vit.blocks):
        block.register_forward_hook(lambda m, args, out, i=i: outputs.update({i: out}))
    with torch.no_grad():
        maps = backbone(image)
    # Six blocks: 1/3, 1/2, 2/3 and the end. Stride 16 is the patch size, so nothing is resized.
    assert backbone.taps == [1, 2, 3, 5]
    raw = outputs[3][:, 1:].transpose(1, 2).reshape(1, 64, 4, 6)
    torch.testing.assert_close(maps["res4"], raw, rtol=0, atol=0)
    raw = outputs[5][:, 1:].transpose(1, 2).reshape(1, 64, 4, 6)
    torch.testing.assert_close(maps["res5"], F.avg_pool2d(raw, 2))


@mark.parametrize("size", [(64, 64), (32, 160)])
def test_pyramid_equals_rein_where_32_divides_the_image(size):
    maps = [torch.randn(2, 5, size[0] // 16, size[1] // 16) for _ in range(4)]
    pyramid = build_pyramid(maps, 16, size)
    for features, scale, ours in zip(maps, (4, 2, 1, 0.5), pyramid.values(), strict=True):
        rein = F.interpolate(features, scale_factor=scale, mode="bilinear", align_corners=False)
        torch.testing.assert_close(ours, rein, rtol=0, atol=0)


@mark.parametrize("patch_size", [8, 14, 16])
@mark.parametrize("stride", STRIDE_OF.values())
@mark.parametrize("size", [(128, 256), (101, 75), (48, 80)])
def test_a_ramp_keeps_its_pixel_coordinates(patch_size, stride, size):
    """A cell that holds the coordinate of its centre still does so after the resize."""

    def centres(count, side):
        return (torch.arange(count) + 0.5) * side

    cells = [-(-extent // patch_size) for extent in size]
    rows, columns = (centres(n, patch_size) for n in cells)
    ramp = torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None]
    resized = resize_to_stride(ramp, patch_size, stride, size)
    for axis, (extent, n) in enumerate(zip(size, cells, strict=True)):
        # Beyond the outermost centres there is nothing to interpolate with: the edge is repeated.
        target = centres(-(-extent // stride), stride)
        target = target.clamp(patch_size / 2, (n - 0.5) * patch_size)
        target = target[:, None] if axis == 0 else target[None]
        torch.testing.assert_close(resized[0, axis], target.expand(resized.shape[2:]))


def test_odd_sizes_are_padded_with_zeros_at_the_bottom_and_the_right():
    backbone, image = tiny(), torch.randn(1, 3, 60, 83)
    padded = F.pad(image, (0, 96 - 83, 0, 64 - 60))
    with torch.no_grad():
        maps, of_padded = backbone(image), backbone(padded)
    # 60 pixels are 15 cells of 4, and 83 are 21: the rest lies in the padding.
    torch.testing.assert_close(maps["res2"], of_padded["res2"][..., :15, :21])
    torch.testing.assert_close(maps["res4"], of_padded["res4"])


def test_an_image_of_img_size_uses_the_stored_position_embedding():
    # 60 pixels are padded to 64, four patches: the embedding is stored for four, not for three.
    assert tiny(img_size=(60, 100)).vit.patch_embed.grid_size == (4, 7)


def test_parameters_of_vitl_as_in_the_paper():
    backbone = on_meta(name="dinov2_vitl", img_size=(512, 512))
    count = sum(p.numel() for p in backbone.parameters())
    assert count == 304_198_656
    # The authors' own DINOv2 also counts its mask token, a vector that no forward pass here uses.
    assert count + backbone.vit.embed_dim == 304_199_680
    assert count / 1e6 == approx(304.20, abs=0.005)
    assert 0.05 * count / 1e6 == approx(15.21, abs=0.005)


def test_a_frozen_backbone_builds_no_graph():
    backbone = tiny().requires_grad_(False).train()
    assert not any(m.requires_grad for m in backbone(torch.randn(1, 3, 37, 64)).values())
    backbone.vit.blocks[5].requires_grad_(True)
    grads = {name: m.requires_grad for name, m in backbone(torch.randn(1, 3, 37, 64)).items()}
    assert grads == {"res2": False, "res3": False, "res4": False, "res5": True}


def test_train_mode_is_deterministic():
    backbone, image = tiny().train(), torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(backbone(image)["res5"], backbone(image)["res5"], rtol=0, atol=0)


@mark.parametrize(
    ("wrong", "message"),
    [
        ({"name": "resnet50"}, "MODEL.VFM.NAME is 'resnet50'; known are dinov2_vits"),
        ({"patch_size": -1}, "MODEL.VFM.PATCH_SIZE -1"),
        ({"img_size": (64,)}, r"MODEL.VFM.IMG_SIZE \(64,\)"),
        ({"img_size": (64, 0)}, r"MODEL.VFM.IMG_SIZE \(64, 0\)"),
        ({"patch_resize": "linear"}, "MODEL.VFM.PATCH_RESIZE is 'linear'; known are 'bicubic'"),
    ],
)
def test_wrong_values_are_named(wrong, message):
    with raises(ValueError, match=message):
        tiny(**wrong)
