"""Detectron2's heads in the segmentor, and the refusal of heads that do not work in it."""

from math import ceil

import pytest
import torch
from detectron2.modeling import META_ARCH_REGISTRY, SEM_SEG_HEADS_REGISTRY
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.projects.point_rend import PointRendSemSegHead, add_pointrend_config
from torch import nn
from torch.nn import functional as F

from fishertune_d2.modeling.heads import SegmentationHead
from fishertune_d2.modeling.targets import SegmentationTargets

from .test_segmentor import CLASSES, build, label, photo, tiny_cfg

HEAD = "MODEL.SEM_SEG_HEAD."
FPN = (HEAD + "NAME", "SemSegFPNHead")
DEEPLAB = (
    HEAD + "NAME", "DeepLabV3PlusHead", HEAD + "IN_FEATURES", ["res2", "res5"],
    HEAD + "ASPP_CHANNELS", 32, HEAD + "ASPP_DILATIONS", [1, 2, 3], "INPUT.CROP.SIZE", [64, 64],
    HEAD + "PROJECT_CHANNELS", [32], HEAD + "LOSS_TYPE", "cross_entropy",
)  # fmt: skip
DEEPLAB_V3 = (
    *DEEPLAB, HEAD + "NAME", "DeepLabV3Head", HEAD + "IN_FEATURES", ["res5"],
    HEAD + "COMMON_STRIDE", 32,
)  # fmt: skip


def _name(keys: tuple) -> str:
    """The last value of NAME among keys and values."""
    return dict(zip(keys[::2], keys[1::2], strict=True))[HEAD + "NAME"]


HEADS = pytest.mark.parametrize("keys", [FPN, DEEPLAB, DEEPLAB_V3], ids=_name)


def _items(*sizes) -> list[dict]:
    return [{"image": photo(h, w, seed=h), "sem_seg": label(h, w)} for h, w in sizes]


def _detectron2s(model: nn.Module) -> SemanticSegmentor:
    """Detectron2's own meta-architecture of the same parts."""
    mean, std = (value.flatten().tolist() for value in (model.pixel_mean, model.pixel_std))
    return SemanticSegmentor(
        backbone=model.backbone, sem_seg_head=model.sem_seg_head, pixel_mean=mean, pixel_std=std
    )


@HEADS
def test_parameters_have_the_names_that_detectron2_gives_them(keys):
    model = build(*keys)
    assert set(model.state_dict()) == set(_detectron2s(model).state_dict())
    assert isinstance(model.head, SegmentationHead)
    assert model.head.num_classes == CLASSES and model.head.ignore_value == 255


@HEADS
def test_losses_and_scores_are_detectron2s(keys):
    model = build(*keys, HEAD + "LOSS_WEIGHT", 2.0, HEAD + "ASPP_DROPOUT", 0.0)
    reference, batch = _detectron2s(model), _items((64, 64), (64, 64))
    assert model(batch) == reference(batch)  # to the bit
    for part in (model, reference):
        part.eval()
    for ours, theirs in zip(model(batch), reference(batch), strict=True):
        torch.testing.assert_close(ours["sem_seg"], theirs["sem_seg"].softmax(0))


@HEADS
@pytest.mark.parametrize("loss_type", ["cross_entropy", "hard_pixel_mining"])
def test_the_loss_of_an_image_is_the_heads_own_on_that_image_alone(keys, loss_type):
    model = build(*keys, HEAD + "LOSS_TYPE", loss_type, HEAD + "ASPP_DROPOUT", 0.0)
    batch = _items((64, 64), (64, 64), (64, 64))
    batch[1]["sem_seg"] = torch.full((64, 64), 255)
    batch[1]["sem_seg"][:20] = 2
    batch[2]["sem_seg"] = batch[2]["sem_seg"].to(torch.uint8)
    features, targets = model.features_and_targets(batch)
    predictions = model.head.predict(features)
    for image, item in enumerate(batch):
        pixels = item["sem_seg"][None].long()
        alone, _ = model.features_and_targets([item])
        _, expected = model.sem_seg_head(alone, pixels)
        loss = model.head.loss_of_image(predictions, targets, image)
        torch.testing.assert_close(loss, sum(expected.values()))


@HEADS
def test_an_image_without_a_label_has_a_loss_of_0_and_a_gradient_of_0(keys):
    model = build(*keys)
    item = {"image": photo(64, 64), "sem_seg": torch.full((64, 64), 255)}
    losses = model([item, item])
    assert set(losses) == {"loss_sem_seg"} and losses["loss_sem_seg"] == 0
    losses["loss_sem_seg"].backward()
    parameters = list(model.sem_seg_head.parameters())
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


@pytest.mark.parametrize("keys", [FPN, DEEPLAB], ids=_name)
def test_parts_of_a_batch_add_up_to_the_loss_of_the_batch(keys):
    model = build(*keys, HEAD + "ASPP_DROPOUT", 0.0)
    batch = _items((64, 64), (64, 64), (64, 64))
    batch[0]["sem_seg"] = batch[0]["sem_seg"].masked_fill(torch.rand(64, 64) < 0.8, 255)
    whole = model.loss_divisors(batch)["loss_sem_seg"]
    parts = [batch[:1], batch[1:]]
    total = sum(
        model(part)["loss_sem_seg"] * model.loss_divisors(part)["loss_sem_seg"] / whole
        for part in parts
    )
    torch.testing.assert_close(total, model(batch)["loss_sem_seg"])
    nothing = [{"sem_seg": torch.full((4, 4), 255)}]
    assert model.loss_divisors(nothing) == {"loss_sem_seg": 1.0}


def test_the_hardest_pixels_of_a_batch_are_not_those_of_its_parts():
    model = build(*DEEPLAB, HEAD + "LOSS_TYPE", "hard_pixel_mining")
    with pytest.raises(ValueError, match=r"hard_pixel_mining .* set SOLVER\.ACCUMULATE 1, or"):
        model.loss_divisors(_items((64, 64)))


class _Padding(nn.Module):
    """A backbone whose maps cover what a ViT's pyramid covers: no more than the last cell."""

    size_divisibility = 14

    def __init__(self, convs):
        super().__init__()
        self.convs = convs

    def output_shape(self):
        return self.convs.output_shape()

    def forward(self, images):
        size = images.shape[-2:]
        maps = self.convs(F.pad(images, (0, 128, 0, 128)))
        return {
            name: maps[name][..., : ceil(size[0] / s.stride), : ceil(size[1] / s.stride)]
            for name, s in self.output_shape().items()
        }


@HEADS
def test_maps_that_end_with_the_image_are_continued(keys):
    changes = (*keys, "INPUT.CROP.ENABLED", False, HEAD + "ASPP_DROPOUT", 0.0)
    model = build(*changes)
    model.backbone = _Padding(model.backbone)
    batch = _items((50, 70), (64, 40))
    losses = model(batch)
    logits = model.head.predict(model.features_and_targets(batch)[0])
    # (50, 70) and (64, 40) are padded to (70, 70), whose maps go on to (96, 96).
    assert logits.shape[-2:] == (96 // model.head.stride, 96 // model.head.stride)
    large = F.interpolate(logits, scale_factor=model.head.stride, mode="bilinear")
    padded = torch.full((2, 96, 96), 255)
    padded[0, :50, :70], padded[1, :64, :40] = batch[0]["sem_seg"], batch[1]["sem_seg"]
    expected = F.cross_entropy(large, padded, ignore_index=255)
    torch.testing.assert_close(losses["loss_sem_seg"], expected)
    model.eval()
    first, second = model(batch)
    assert first["sem_seg"].shape == (CLASSES, 50, 70)
    assert second["sem_seg"].shape == (CLASSES, 64, 40)


def test_sums_of_classes_are_1_in_windows_and_in_whole_images():
    for changes in ((), ("TEST.MODE", "slide")):
        model = build(*FPN, *changes).eval()
        (scores,) = model([{"image": photo(90, 100)}])
        torch.testing.assert_close(scores["sem_seg"].sum(0), torch.ones(90, 100))


def test_what_pools_over_the_training_crop_scores_images_of_any_size():
    model = build(*DEEPLAB, "TEST.MODE", "whole").eval()
    seen = []
    model.sem_seg_head.decoder["res5"]["project_conv"].register_forward_hook(
        lambda module, inputs, output: seen.append(tuple(inputs[0].shape[-2:]))
    )
    for size, cells in (((64, 64), (2, 2)), ((70, 130), (4, 6)), ((40, 40), (2, 2))):
        (scores,) = model([{"image": photo(*size)}])
        assert scores["sem_seg"].shape == (CLASSES, *size)
        assert seen.pop() == cells


def test_logits_are_float32_under_autocast():
    model = build(*DEEPLAB, HEAD + "ASPP_DROPOUT", 0.0)
    batch = _items((64, 64))
    exact = model(batch)["loss_sem_seg"]
    with torch.autocast("cpu", torch.bfloat16):
        features, targets = model.features_and_targets(batch)
        assert model.head.predict(features).dtype == torch.float32
        loss = model(batch)["loss_sem_seg"]
        assert model.eval()(batch)[0]["sem_seg"].dtype == torch.float32
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, exact, rtol=1e-2, atol=0)


def test_log_probabilities_are_those_of_the_scores():
    model = build(*FPN)
    features, _ = model.features_and_targets(_items((64, 64)))
    predictions = model.head.predict(features)
    found = model.head.log_probabilities(predictions)
    assert found.shape == (1, CLASSES, 16, 16)
    torch.testing.assert_close(found.exp().sum(1), torch.ones(1, 16, 16))
    torch.testing.assert_close(found, predictions - predictions.logsumexp(1, keepdim=True))


# ---- refusals ---------------------------------------------------------------------------------

WORKING = (
    "These heads work: Mask2FormerHead, MaskTextHead, TextQueryHead, SemSegFPNHead, "
    "DeepLabV3PlusHead, DeepLabV3Head"
)


def test_pointrend_is_refused_with_the_heads_that_work():
    cfg = tiny_cfg(HEAD + "NAME", PointRendSemSegHead.__name__)
    add_pointrend_config(cfg)
    cfg.MODEL.POINT_HEAD.NUM_CLASSES = CLASSES
    cfg.MODEL.POINT_HEAD.IN_FEATURES = ["res2"]
    cfg.MODEL.POINT_HEAD.COARSE_SEM_SEG_HEAD_NAME = "SemSegFPNHead"
    cfg.MODEL.POINT_HEAD.NAME = "StandardPointHead"
    with pytest.raises(ValueError, match=f"PointRendSemSegHead.* no attribute .*{WORKING}"):
        META_ARCH_REGISTRY.get("VFMSegmentor")(cfg)


@SEM_SEG_HEADS_REGISTRY.register()
class HeadOfOneMap(nn.Module):
    """What a tutorial would write: it scores, at a quarter of the size, and nothing else."""

    def __init__(self, cfg, input_shape):
        super().__init__()
        self.ignore_value, self.num_classes = 255, CLASSES
        self.predictor = nn.Conv2d(8, CLASSES, 1)

    def forward(self, features, targets=None):
        return self.predictor(features["res2"]), {}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ((HEAD + "NAME", "HeadOfOneMap"), f"is HeadOfOneMap, which .* no attribute .*{WORKING}"),
        (
            (*FPN, HEAD + "COMMON_STRIDE", 8),
            "COMMON_STRIDE 8 its maps differ .*COMMON_STRIDE 4, the sm",
        ),
        ((*FPN, HEAD + "COMMON_STRIDE", 0), "COMMON_STRIDE is 0: choose .* 4 pixels"),
        (
            (*FPN, HEAD + "CONVS_DIM", 48, HEAD + "NORM", "GN"),
            "48 .*multiples of 32 for CONVS_D.*NORM BN",
        ),
        ((*FPN, HEAD + "NORM", "XX"), "NORM is 'XX': choose GN"),
        ((*FPN, HEAD + "IN_FEATURES", []), "IN_FEATURES is empty"),
        ((HEAD + "NAME", "PointRendSemSegHead"), f"not have .POINT_HEAD.*{WORKING}"),
        ((HEAD + "NAME", "SemSegFPN"), f"no head of this name is registered. {WORKING}"),
        ((*DEEPLAB, HEAD + "ASPP_DILATIONS", [1, 2]), "ASPP_DILATIONS has the length 2: set three"),
        ((*DEEPLAB, HEAD + "LOSS_TYPE", "focal"), "LOSS_TYPE is focal: set cross_entropy"),
        ((*DEEPLAB, HEAD + "NAME", "DeepLabV3Head"), r"takes one map.* IN_FEATURES \['res5'\]"),
        (
            ("MODEL.MASK_FORMER.NHEADS", 7),
            "HIDDEN_DIM .* no multiple of MODEL.MASK_FORMER.NHEADS 7",
        ),
        ((*DEEPLAB, HEAD + "COMMON_STRIDE", 8), "set MODEL.SEM_SEG_HEAD.COMMON_STRIDE 4"),
        (
            (*DEEPLAB, HEAD + "PROJECT_CHANNELS", [8, 8]),
            r"PROJECT_CHANNELS has the length 2, .* set PROJECT_CHANNELS \[32\]",
        ),
        ((HEAD + "IN_FEATURES", ["p2", "res3"]), "IN_FEATURES names p2, .* has res2, res3, res4"),
        ((*FPN, HEAD + "IN_FEATURES", ["res2", "p3"]), "IN_FEATURES names p3, .* has res2, res3"),
    ],
)
def test_what_cannot_work_is_refused_when_the_model_is_built(keys, message):
    with pytest.raises(ValueError, match=message):
        build(*keys)


def test_a_crop_that_the_backbone_pads_beyond_the_pooling_window_is_refused(monkeypatch):
    model = build(*DEEPLAB)
    with pytest.raises(
        ValueError, match=r"SIZE \[64, 64\].* padded to \[70, 70\].* multiple of 224"
    ):
        type(model)(
            backbone=_Padding(model.backbone), sem_seg_head=model.sem_seg_head,
            pixel_mean=[0.0] * 3, pixel_std=[1.0] * 3, test_mode="whole", crop_size=(64, 64),
            stride=(64, 64),
        )  # fmt: skip


def test_trying_a_head_out_changes_neither_its_mode_nor_random_numbers():
    torch.manual_seed(3)
    model = build(*DEEPLAB, HEAD + "NORM", "BN")  # build sets the seed 0
    assert all(module.training for module in model.modules())
    assert not any("num_batches" in name and value for name, value in model.named_buffers())
    torch.manual_seed(0)
    cfg = tiny_cfg(*DEEPLAB, HEAD + "NORM", "BN")
    parts = type(model).from_config(cfg)
    before = torch.get_rng_state()
    type(model)(**parts)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_head_with_the_contract_needs_no_adapter():
    model = build()
    assert model.head is model.sem_seg_head
    targets = SegmentationTargets(label(64, 64)[None], [torch.arange(CLASSES)])
    features, _ = model.features_and_targets(_items((64, 64)))
    loss = model.head.loss_of_image(model.head.predict(features), targets, 0)
    assert loss.dim() == 0 and loss > 0
