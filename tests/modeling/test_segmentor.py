"""The segmentor: padding, losses, whole and sliding inference, sizes, errors."""

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone
from torch import nn

from fishertune_d2.config import default_config
from fishertune_d2.modeling import mask2former, segmentor  # noqa: F401  (registered by import)
from fishertune_d2.modeling.sliding import sliding_average, window_starts

CLASSES = 4


@BACKBONE_REGISTRY.register()
class StridedConvs(Backbone):
    """One convolution for each stride."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.strides = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}
        self.convs = nn.ModuleDict({n: nn.Conv2d(3, 8, s, s) for n, s in self.strides.items()})

    @property
    def size_divisibility(self):
        return 32

    def output_shape(self):
        return {n: ShapeSpec(channels=8, stride=s) for n, s in self.strides.items()}

    def forward(self, images):
        self.seen = images
        return {n: conv(images) for n, conv in self.convs.items()}


def tiny_cfg(*changes):
    cfg = default_config()
    cfg.MODEL.BACKBONE.NAME = "StridedConvs"
    cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES = CLASSES
    cfg.MODEL.SEM_SEG_HEAD.CONVS_DIM = cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 32
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 1
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD = 64
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 32
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 64
    cfg.MODEL.MASK_FORMER.NHEADS = 4
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 3
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 8
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 64
    cfg.TEST.CROP_SIZE, cfg.TEST.STRIDE = [64, 64], [43, 43]
    cfg.merge_from_list(list(changes))
    return cfg


def build(*changes):
    torch.manual_seed(0)
    cfg = tiny_cfg(*changes)
    return META_ARCH_REGISTRY.get(cfg.MODEL.META_ARCHITECTURE)(cfg)


def photo(height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=generator)


def label(height, width):
    return torch.arange(width).mul(CLASSES).div(width, rounding_mode="floor").expand(height, width)


# ---- training ---------------------------------------------------------------------------------


def test_training_pads_after_normalising_and_ignores_the_padding(monkeypatch):
    model = build()
    seen = []

    def record(features, targets):
        seen.append(targets)
        return None, {"loss": torch.zeros(())}

    monkeypatch.setattr(model.sem_seg_head, "forward", record)
    first, second = photo(50, 70), photo(64, 40, seed=1)
    model(
        [
            {"image": first, "sem_seg": label(50, 70)},
            {"image": second, "sem_seg": label(64, 40)},
        ]
    )
    images, targets = model.backbone.seen, seen[0].pixels
    assert images.shape == (2, 3, 64, 96) and targets.shape == (2, 64, 96)
    red = (first[0, 7, 9].item() - 123.675) / 58.395
    assert images[0, 0, 7, 9].item() == pytest.approx(red, rel=1e-5)
    assert not images[0, :, 50:].any() and not images[0, :, :, 70:].any()
    assert not images[1, :, :, 40:].any()
    assert torch.equal(targets[0, :50, :70], label(50, 70))
    assert (targets[0, 50:] == 255).all() and (targets[:, :, 70:] == 255).all()
    assert (targets[1, :, 40:] == 255).all()


def test_training_learns_two_images():
    model = build()
    batch = [
        {"image": photo(50, 70), "sem_seg": label(50, 70)},
        {"image": photo(64, 40, seed=1), "sem_seg": label(64, 40)},
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    totals = []
    for _ in range(40):
        losses = model(batch)
        total = sum(losses.values())
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        totals.append(total.item())
    assert all(p.grad is not None for p in model.parameters())
    assert sum(totals[-5:]) < 0.7 * sum(totals[:5])
    model.eval()
    predicted = model(batch)[0]["sem_seg"].argmax(0)
    assert (predicted == label(50, 70)).float().mean() > 0.6  # four classes: chance is 0.25


def test_training_without_labels_is_refused():
    with pytest.raises(KeyError, match="street.png.*training mode"):
        build()([{"image": photo(64, 64), "file_name": "street.png"}])


def test_labels_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"street.png.*\(64, 64\).*\(32, 64\)"):
        build()([{"image": photo(64, 64), "sem_seg": label(32, 64), "file_name": "street.png"}])


# ---- inference --------------------------------------------------------------------------------


def scores(model, image, **size):
    return model.eval()([{"image": image, **size}])[0]["sem_seg"]


@pytest.mark.parametrize("size", [(64, 64), (50, 60)])
def test_sliding_equals_whole_where_one_window_covers_the_image(size):
    slide, whole = build("TEST.MODE", "slide"), build("TEST.MODE", "whole")
    assert torch.equal(scores(slide, photo(*size)), scores(whole, photo(*size)))


def test_sliding_averages_the_scores_of_its_windows():
    model, image = build("TEST.MODE", "slide"), photo(64, 90)
    result = scores(model, image)
    whole = build("TEST.MODE", "whole")
    left, right = scores(whole, image[:, :, :64]), scores(whole, image[:, :, 26:])
    assert result.shape == (CLASSES, 64, 90)
    torch.testing.assert_close(result[:, :, :26], left[:, :, :26])
    torch.testing.assert_close(result[:, :, 64:], right[:, :, 38:])
    torch.testing.assert_close(result[:, :, 26:64], (left[:, :, 26:] + right[:, :, :38]) / 2)


@pytest.mark.parametrize("together", [2, 4, 100])
def test_windows_in_batches_score_as_one_by_one(together):
    image = photo(70, 160)  # 2 x 4 windows
    one_by_one = scores(build("TEST.MODE", "slide"), image)
    model = build("TEST.MODE", "slide", "TEST.WINDOWS_PER_BATCH", together)
    batches = []
    model.backbone.register_forward_pre_hook(lambda _, inputs: batches.append(len(inputs[0])))
    torch.testing.assert_close(scores(model, image), one_by_one, rtol=1e-5, atol=1e-6)
    assert batches == {2: [2] * 4, 4: [4] * 2, 100: [8]}[together]


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scores_are_float32_under_autocast(mode):
    model, image = build("TEST.MODE", mode), photo(64, 90)
    exact = scores(model, image)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = scores(model, image)
    assert rounded.dtype == torch.float32
    assert 0 < (rounded - exact).abs().max() < 0.1 * exact.max()


@pytest.mark.parametrize("mode", ["whole", "slide"])
def test_scores_have_the_size_of_the_label_and_no_gradient(mode):
    model, image = build("TEST.MODE", mode), photo(70, 100)
    own = scores(model, image)
    large = scores(model, image, height=140, width=200)
    assert own.shape == (CLASSES, 70, 100) and large.shape == (CLASSES, 140, 200)
    assert not large.requires_grad
    expected = torch.nn.functional.interpolate(own[None], (140, 200), mode="bilinear")[0]
    torch.testing.assert_close(large, expected)


def test_scores_are_those_of_the_padded_image_without_its_padding():
    model, image = build("TEST.MODE", "whole"), photo(50, 60)
    padded = model.pixel_mean.expand(3, 64, 64).clone()  # zero once normalised
    padded[:, :50, :60] = image
    torch.testing.assert_close(scores(model, image), scores(model, padded)[:, :50, :60])


def test_a_result_does_not_depend_on_its_batch():
    model = build().eval()
    batch = [{"image": photo(70, 100)}, {"image": photo(40, 130, seed=1)}]
    together = model(batch)
    for inputs, result in zip(batch, together, strict=True):
        assert torch.equal(result["sem_seg"], model([inputs])[0]["sem_seg"])
        assert result["sem_seg"].shape[1:] == inputs["image"].shape[1:]


def test_unknown_mode_and_gaps_are_refused():
    with pytest.raises(ValueError, match="'tiles'.*whole, slide"):
        build("TEST.MODE", "tiles")
    with pytest.raises(ValueError, match="TEST.STRIDE"):
        build("TEST.STRIDE", [65, 43])
    with pytest.raises(ValueError, match="TEST.WINDOWS_PER_BATCH is 0: choose at least 1"):
        build("TEST.WINDOWS_PER_BATCH", 0)


def test_the_statistics_follow_the_device_and_stay_out_of_checkpoints():
    model = build()
    assert not [name for name in model.state_dict() if name.startswith("pixel_")]
    assert model.to("meta").device.type == "meta"


# ---- windows ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("length", "window", "stride", "starts"),
    [
        (512, 512, 341, [0]),
        (300, 512, 341, [0]),
        (513, 512, 341, [0, 1]),
        (1024, 512, 341, [0, 341, 512]),
        (853, 512, 341, [0, 341]),
        (2048, 512, 341, [0, 341, 682, 1023, 1364, 1536]),
    ],
)
def test_windows_are_clamped_to_the_border(length, window, stride, starts):
    assert window_starts(length, window, stride) == starts


def test_sliding_average_of_a_pointwise_function_is_the_function():
    image = torch.rand(3, 37, 53)
    sizes = set()

    def predict(parts):
        sizes.add(tuple(parts.shape[-2:]))
        return 2 * parts

    for batch in (1, 3, 50):
        result = sliding_average(predict, image, (16, 20), (11, 13), batch)
        torch.testing.assert_close(result, 2 * image)
    assert sizes == {(16, 20)}


def test_images_are_normalised_as_the_config_or_the_authors_say():
    vfm = ["MODEL.VFM.NAME", "clip_vitl"]
    config = build(*vfm)
    assert config.pixel_mean.flatten().tolist() == pytest.approx([123.675, 116.28, 103.53])
    authors = build(*vfm, "MODEL.VFM.PIXELS", "authors")
    assert authors.pixel_mean.flatten().tolist() == pytest.approx([122.771, 116.746, 104.094])
    assert authors.pixel_std.flatten().tolist() == pytest.approx([68.501, 66.632, 70.323])
    with pytest.raises(ValueError, match="MODEL.VFM.PIXELS is 'mine'"):
        build(*vfm, "MODEL.VFM.PIXELS", "mine")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (("MODEL.PIXEL_MEAN", [1.0]), r"MODEL.PIXEL_MEAN is \[1.0\]: give three numbers"),
        (("MODEL.PIXEL_STD", [1.0, 2.0]), r"MODEL.PIXEL_STD is \[1.0, 2.0\]: give three numbers"),
        (("MODEL.PIXEL_STD", [1.0, 0.0, 1.0]), "MODEL.PIXEL_STD .* choose numbers above 0"),
        (("TEST.CROP_SIZE", [64], "TEST.STRIDE", [43]), "give a height and a width in each"),
    ],
)
def test_lists_of_another_length_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        build(*keys)
