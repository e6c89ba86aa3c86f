"""The table's facts, and its models at their real size, on the meta device."""

from collections import Counter
from dataclasses import replace
from functools import cache

import timm
import torch
from pytest import approx, mark, raises

from fishertune_d2.fisher import find_candidates
from fishertune_d2.modeling.plain_vit import PlainViTs
from fishertune_d2.modeling.vfm import VFMS, VFMBackbone
from fishertune_d2.modeling.vfm_table import IMAGENET, OPENAI, Pixels, pixel_statistics

VITS = [name for name, vfm in VFMS.items() if isinstance(vfm.family, PlainViTs)]


@cache  # the tests only read the models
def on_meta(name: str) -> VFMBackbone:
    """Returns a VFM without memory for its weights, for 512 x 512 pixels and patches of 16."""
    with torch.device("meta"):
        return VFMBackbone(name=name, weights="random", img_size=(512, 512), patch_size=16).eval()


@mark.parametrize("name", VFMS)
def test_entries_agree_with_timm(name):
    vfm = VFMS[name]
    public = timm.models.get_pretrained_cfg(vfm.timm_name)
    assert public.hf_hub_id
    assert (3, vfm.img_size, vfm.img_size) == tuple(public.input_size)
    assert vfm.pixels.mean == approx([255 * m for m in public.mean], abs=1e-3)
    assert vfm.pixels.std == approx([255 * s for s in public.std], abs=1e-3)
    assert vfm.source.startswith("https://")
    if public.url:
        assert vfm.source == public.url
    # timm gives OpenAI's CLIP its own default; its authors' repository says MIT.
    if name != "clip_vitl":
        assert vfm.licence.lower().replace(" ", "-") == public.license


@mark.parametrize("name", VITS)
def test_patch_size_0_is_the_size_of_the_training(name, monkeypatch):
    vfm = VFMS[name]
    monkeypatch.setitem(VFMS, name, replace(vfm, options={**vfm.options, "depth": 6}))
    with torch.device("meta"):
        backbone = VFMBackbone(name=name, weights="random", img_size=(512, 512), patch_size=0)
    assert backbone.size_divisibility == vfm.patch_size


@mark.parametrize("name", VITS)
def test_real_sizes_give_a_pyramid(name):
    backbone = on_meta(name)
    depth, channels = len(backbone.vit.blocks), backbone.vit.embed_dim
    assert len(set(backbone.taps)) == 4 and backbone.taps[-1] == depth - 1
    maps = backbone(torch.zeros(1, 3, 301, 417, device="meta"))
    assert maps["res3"].shape == (1, channels, 38, 53)


@mark.parametrize(
    ("name", "taps"),
    [
        ("dinov2_vitl", [7, 11, 15, 23]),  # Rein's
        ("dinov2_vitb", [3, 5, 7, 11]),
        ("mae_vith", [9, 15, 20, 31]),
    ],
)
def test_taps_are_thirds(name, taps):
    backbone = on_meta(name)
    assert backbone.taps == taps
    points = backbone.perturbation_points()
    assert points == [backbone.vit.patch_embed, *(backbone.vit.blocks[i] for i in taps[:3])]


def test_sam_is_tapped_where_its_attention_is_global():
    backbone = on_meta("sam_vith")
    whole = [i for i, block in enumerate(backbone.vit.blocks) if block.window_size == 0]
    assert backbone.taps == whole == [7, 15, 23, 31]
    points = backbone.perturbation_points()
    assert points[1:] == [backbone.vit.blocks[i] for i in (9, 15, 20)]
    assert backbone.num_prefix_tokens == 0


@mark.parametrize(
    ("name", "prefix"), [("dinov2_vits_reg", 5), ("clip_vitl", 1), ("dinov3_vits", 5)]
)
def test_prefix_tokens(name, prefix):
    assert on_meta(name).num_prefix_tokens == prefix


def block(channels, hidden, layers=2, biases="qkv") -> dict[str, int]:
    """Candidates of one block by kind: ``layers`` linear layers between channels and hidden."""
    attention = {k: channels**2 + channels * (k.lower() in biases) for k in "QKV"}
    return attention | {"FFN": layers * channels * hidden + (layers - 1) * hidden + channels}


COUNTS = {
    # name: (backbone, candidates), at 512 x 512 with patches of 16; and blocks, one block's kinds
    "dinov2_vits": (21_992_832, 19_501_056, 12, block(384, 1536)),
    "dinov2_vitb": (86_452_992, 77_930_496, 12, block(768, 3072)),
    "dinov2_vitl": (304_198_656, 277_020_672, 24, block(1024, 4096)),
    "dinov2_vitg": (1_136_225_792, 1_038_663_680, 40, block(1536, 4096, 3)),
    "dinov2_vitl_reg": (304_201_728, 277_020_672, 24, block(1024, 4096)),
    "clip_vitl": (304_150_528, 277_020_672, 24, block(1024, 4096)),
    "mae_vitl": (304_149_504, 277_020_672, 24, block(1024, 4096)),
    "mae_vith": (631_978_240, 577_044_480, 32, block(1280, 5120)),
    "sam_vith": (632_134_400, 577_044_480, 32, block(1280, 5120)),
    # 24 * 2730 * 2 less than with the norm inside the feed-forward network.
    "eva02_vitl": (304_239_552, 276_979_680, 24, block(1024, 2730, 3, "qv")),
    "eva02_clip_vitl": (304_288_704, 276_979_680, 24, block(1024, 2730, 3, "qv")),
    "eva02_clip_vitl_336": (304_288_704, 276_979_680, 24, block(1024, 2730, 3, "qv")),
    "dinov3_vitl": (303_079_424, 276_946_944, 24, block(1024, 4096, 2, "")),
    "dinov3_vith_plus": (840_509_440, 786_800_640, 32, block(1280, 5120, 3, "")),
}


@mark.parametrize("name", COUNTS)
def test_parameters_and_candidates(name):
    total, candidates, depth, of_block = COUNTS[name]
    backbone = on_meta(name)
    assert sum(p.numel() for p in backbone.parameters()) == total
    found = Counter()
    for candidate in find_candidates(backbone):
        found[candidate.block, candidate.kind] += candidate.numel
    assert found == {(i, kind): n for i in range(depth) for kind, n in of_block.items()}
    assert found.total() == candidates


def test_the_papers_count_of_sam_keeps_all_relative_positions():
    """The paper counts 632.18 M: 127 relative positions, of images of 1024, in four blocks."""
    total = sum(p.numel() for p in on_meta("sam_vith").parameters())
    assert (total + 4 * 2 * (127 - 63) * 80) / 1e6 == approx(632.18, abs=0.005)


def test_pixel_statistics():
    assert pixel_statistics("clip_vitl", "config", IMAGENET) == IMAGENET
    assert pixel_statistics("clip_vitl", "authors", IMAGENET) == OPENAI
    own = Pixels([1, 2, 3], [4, 5, 6])
    assert pixel_statistics("clip_vitl", "config", own) == own
    with raises(ValueError, match="MODEL.VFM.PIXELS is 'openai'; known are 'config', 'authors'"):
        pixel_statistics("clip_vitl", "openai", IMAGENET)
