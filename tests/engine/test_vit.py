"""Which module of a model FisherTune takes for the ViT, and what it leaves alone around it."""

import logging
from itertools import cycle

import pytest
import timm
import torch
from detectron2.engine import SimpleTrainer
from detectron2.layers import ShapeSpec
from detectron2.modeling import FPN, Backbone, SimpleFeaturePyramid, ViT
from detectron2.modeling.backbone.swin import SwinTransformer
from detectron2.modeling.meta_arch import SemanticSegmentor
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import nn

from fishertune_d2 import apply_fishertune
from fishertune_d2.engine.vit import find_vit, parameters_of_vit, require_nothing_around
from fishertune_d2.modeling import VFMBackbone
from fishertune_d2.modeling.vfm_table import VFMS

STEPS, WARMUP, CLASSES = 4, 2, 3
MAPS = ["res2", "res3", "res4", "res5"]


def _vfm() -> VFMBackbone:
    return VFMBackbone(name="tiny", weights="random", img_size=[64, 64], patch_size=16)


def _fpn() -> Backbone:
    return FPN(_vfm(), MAPS, 32)


VIT = {
    **{"img_size": 64, "patch_size": 16, "embed_dim": 24, "depth": 3, "num_heads": 2},
    **{"window_size": 0, "pretrain_img_size": 64, "out_feature": "last_feat"},
}


def _vitdet() -> Backbone:
    return SimpleFeaturePyramid(ViT(**VIT), "last_feat", 32, (4.0, 2.0, 1.0, 0.5), norm="LN")


class _Neck(Backbone):
    """A ViT and a convolution that is no FPN."""

    def __init__(self):
        super().__init__()
        self.inner = _vfm()
        self.extra = nn.ModuleDict({name: nn.Conv2d(64, 32, 1) for name in MAPS})

    def forward(self, images):
        return {name: self.extra[name](x) for name, x in self.inner(images).items()}

    def output_shape(self):
        strides = {name: shape.stride for name, shape in self.inner.output_shape().items()}
        return {name: ShapeSpec(channels=32, stride=stride) for name, stride in strides.items()}


def _segmentor(backbone: Backbone) -> nn.Module:
    torch.manual_seed(0)
    shapes = backbone.output_shape()
    stride = min(shape.stride for shape in shapes.values())
    head = SemSegFPNHead(shapes, num_classes=CLASSES, conv_dims=32, common_stride=stride, norm="GN")
    return SemanticSegmentor(
        backbone=backbone, sem_seg_head=head, pixel_mean=[127.0] * 3, pixel_std=[60.0] * 3
    )


def _data() -> list[list[dict]]:
    torch.manual_seed(1)
    item = lambda: {  # noqa: E731
        "image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8),
        "sem_seg": torch.randint(0, CLASSES, (64, 64)),
    }
    return [[item(), item()] for _ in range(2)]


def _train(model, named, path, own, tmp_path, caplog) -> str:
    """Trains the backbone ``named``, checks which weights moved, and returns the log."""
    # The ViT is at ``path``; ``own`` are the beginnings of the names of its own weights.
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = SimpleTrainer(model, cycle(_data()), torch.optim.AdamW(model.parameters(), 1e-3))
    options = {"max_iter": STEPS, "warmup": WARMUP, "batches": 1, "backbone": named}
    with caplog.at_level(logging.INFO, logger="fishertune_d2.engine.other_trainers"):
        estimation = apply_fishertune(trainer, _data(), output_dir=tmp_path, **options)
    trainer.train(0, STEPS)
    masks = {f"{path}.{n}": mask for n, mask in estimation.selection.masks(0.05).items()}
    selected = 0
    for name, value in model.named_parameters():
        moved = value != start[name]
        if name.startswith(own):
            assert not moved[~masks.get(name, torch.zeros_like(moved))].any(), name
            selected += int(moved.sum())
        else:
            assert moved.any(), name
    inside = sum(value.numel() for name, value in start.items() if name.startswith(own))
    assert estimation.base == inside
    assert selected == int(0.05 * inside)
    # The counts in the log are those of the model.
    (text,) = [r.getMessage() for r in caplog.records if r.name.endswith("engine.other_trainers")]
    numbers = [int(word.replace(",", "")) for word in text.split() if word[0].isdigit()]
    assert sum(numbers) == sum(value.numel() for value in start.values())
    assert sum(numbers[:2]) == inside
    return text


@pytest.mark.parametrize(
    ("make", "named", "path"),
    [
        (_fpn, None, "backbone.bottom_up.vit"),
        (_fpn, "backbone.bottom_up", "backbone.bottom_up.vit"),
        (_vitdet, None, "backbone.net"),
        (_Neck, None, "backbone.inner.vit"),
        (_vfm, None, "backbone.vit"),
    ],
)
def test_what_is_around_the_vit_trains_as_before(make, named, path, tmp_path, caplog):
    model = _segmentor(make())
    assert find_vit(model, named)[0] == path
    text = _train(model, named, path, (f"{path}.",), tmp_path, caplog)
    assert f"FisherTune on {path} " in text


class _Model(nn.Module):
    def __init__(self, **parts: nn.Module):
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def _timm() -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=0, embed_dim=24, depth=3, num_heads=2
    )


def test_two_vits_in_a_backbone_are_refused_by_name():
    for both in (_Model(rgb=_timm(), depth=_timm()), nn.Sequential(_timm(), _timm())):
        names = [f"backbone.{name}" for name, _ in both.named_children()]
        with pytest.raises(
            ValueError, match=f"more than one module with blocks, {names[0]} and {names[1]}"
        ):
            find_vit(_Model(backbone=both))
        for name in names:
            assert find_vit(_Model(backbone=both), name)[0] == name


def test_a_neck_with_blocks_of_its_own_is_not_taken_for_the_vit():
    neck = _timm()
    del neck.patch_embed
    model = _Model(backbone=_Model(vit=_timm(), neck=neck))
    with pytest.raises(ValueError, match=r"backbone\.vit and backbone\.neck"):
        find_vit(model)


def test_a_vit_elsewhere_in_the_model_is_left_alone():
    model = _Model(backbone=_Model(vit=_timm()), teacher=_timm())
    assert find_vit(model)[0] == "backbone.vit"


def test_a_vit_under_two_names_is_one():
    vit = _timm()
    model = _Model(backbone=_Model(one=vit, other=vit), encoder=vit)
    for name in (None, "backbone.one", "backbone.other", "encoder"):
        assert find_vit(model, name)[1] is vit


@pytest.mark.parametrize("wrap", [lambda swin: swin, lambda swin: _Model(bottom_up=swin)])
def test_a_backbone_in_stages_is_taken_whole(wrap):
    swin = SwinTransformer(
        embed_dim=24, depths=[1, 1, 2], num_heads=[1, 2, 4], window_size=4, out_indices=(2,)
    )
    assert find_vit(_Model(backbone=wrap(swin)))[1] is swin


@pytest.mark.parametrize(
    ("model", "name", "message"),
    [
        (_Model(encoder=_timm(), head=nn.Linear(1, 1)), None,
         "no submodule 'backbone'.* it has encoder, head; a ViT's blocks are in encoder$"),
        (_Model(backbone=nn.Linear(1, 1)), None, "backbone: Linear has no parameter named blocks"),
        (_Model(backbone=nn.Linear(1, 1), encoder=_timm()), "backbone",
         "no parameter named blocks.*; a ViT's blocks are in encoder$"),
        (_Model(backbone=_timm()), "encoder", "'encoder': .* a ViT's blocks are in backbone$"),
    ],
)  # fmt: skip
def test_says_where_the_blocks_are(model, name, message):
    with pytest.raises(ValueError, match=message):
        find_vit(model, name)


def test_the_three_stage_trainer_takes_a_vit_with_nothing_around_it():
    require_nothing_around(_segmentor(_vfm()))
    with pytest.raises(
        ValueError, match=r"FPN has 45,312 weights around its ViT backbone\.bottom_up"
    ):
        require_nothing_around(_segmentor(_fpn()))
    with pytest.raises(ValueError, match="VisionTransformer has no vit, perturbation_points"):
        require_nothing_around(_Model(backbone=_timm()))


class _NeckInside(ViT):
    """As BEiT's and MAE's classes for detection, SETR's and SAM's: the neck beside the blocks."""

    def __init__(self):
        super().__init__(**VIT)
        self.fpn1 = nn.ConvTranspose2d(24, 24, 2, 2)
        self.neck = nn.Sequential(nn.Conv2d(24, 32, 1), nn.GroupNorm(4, 32))
        self.scale = nn.Parameter(torch.ones(32, 1, 1))
        self.decode = nn.Conv2d(32, 32, 1)

    def forward(self, images):
        x = self.fpn1(super().forward(images)["last_feat"])
        return {"out": self.decode(self.scale * self.neck(x))}

    def output_shape(self):
        return {"out": ShapeSpec(channels=32, stride=8)}


def test_a_neck_in_the_class_of_the_vit_trains_as_before(tmp_path, caplog):
    torch.manual_seed(0)
    model = _segmentor(_NeckInside())
    vit = ("backbone.blocks.", "backbone.patch_embed.", "backbone.pos_embed")
    text = _train(model, None, "backbone", vit, tmp_path, caplog)
    for part in ("fpn1", "neck", "scale", "decode"):
        start = f"backbone.{part}"
        count = sum(p.numel() for name, p in model.named_parameters() if name.startswith(start))
        assert f"{count:,} of {start}" in text


def _parts(names) -> set[str]:
    return {name.partition(".")[0] for name in names}


@pytest.mark.parametrize(
    ("name", "others"),
    [
        ("vit_base_patch16_clip_224", {"head"}),
        ("vit_base_patch14_reg4_dinov2", set()),
        ("vit_base_patch16_siglip_224", {"attn_pool"}),
        ("samvit_base_patch16", {"neck"}),
        ("beit_base_patch16_224", {"head"}),
        ("eva02_base_patch14_224", set()),
        ("vit_base_patch16_dinov3", set()),
        ("deit_base_distilled_patch16_224", {"head", "head_dist"}),
        ("vit_base_r50_s16_384", {"head"}),
        ("naflexvit_base_patch16_gap", {"head"}),
        ("vit_relpos_base_patch16_224", {"head"}),
        ("hiera_tiny_224", {"head"}),
    ],
)
def test_what_timms_classes_hold_beside_the_vit(name, others):
    with torch.device("meta"):
        vit = timm.create_model(name)
    everything = dict(vit.named_parameters())
    own = parameters_of_vit(vit)
    assert _parts(everything.keys() - own.keys()) == others
    assert "blocks" in _parts(own)


@pytest.mark.parametrize("name", VFMS)
def test_the_vits_of_our_backbones_are_whole(name):
    with torch.device("meta"):
        vit = timm.create_model(VFMS[name].timm_name, num_classes=0, **VFMS[name].options)
    for part in VFMS[name].without:
        setattr(vit, part, nn.Identity())
    assert parameters_of_vit(vit).keys() == dict(vit.named_parameters()).keys()


def test_detectron2s_backbone_in_stages_is_whole():
    swin = SwinTransformer(
        embed_dim=24, depths=[1, 1], num_heads=[1, 2], window_size=4, ape=True, out_indices=(1,)
    )
    assert parameters_of_vit(swin).keys() == dict(swin.named_parameters()).keys()


def test_a_neck_that_is_built_before_the_blocks_is_not_the_vits():
    vit = _timm()
    blocks = vit.blocks
    del vit.blocks
    vit.fpn1, vit.stem, vit.blocks = nn.Linear(2, 2), nn.Linear(2, 2), blocks
    own = _parts(parameters_of_vit(vit))
    assert {"stem", "blocks", "norm"} <= own and "fpn1" not in own


def test_the_three_stage_trainer_takes_no_neck_in_the_class_of_the_vit():
    with pytest.raises(ValueError, match=r"weights around its ViT backbone \(scale, \.\.\.\)"):
        require_nothing_around(_segmentor(_NeckInside()))
