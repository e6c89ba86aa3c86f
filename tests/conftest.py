"""Fixtures of several rooms: real data, small ViTs of every layout, images, a loss."""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from fishertune_d2.modeling.vfm import VFMS, VFMBackbone
from fishertune_d2.streets.dataset import DOMAINS, GENERATOR_VERSION, VERSION_FILE

CLASSES = 3
# The device of the tests' models: "cpu", or "cuda" on a machine with a GPU.
DEVICE = os.environ.get("FISHERTUNE_TEST_DEVICE", "cpu")


@pytest.fixture(autouse=True, scope="session")
def convolutions_in_float32() -> None:
    """By default torch rounds a GPU's convolutions to TF32; the tests compare float32."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def device() -> str:
    """The value of FISHERTUNE_TEST_DEVICE, for the tests that can run on a GPU."""
    return DEVICE


@pytest.fixture
def shared_dir() -> Path:
    """The folder with real data (``datasets/CamVid``) and weights; skips the test without it."""
    default = Path(__file__).resolve().parents[2] / "shared"
    folder = Path(os.environ.get("FISHERTUNE_SHARED", default))
    if not (folder / "datasets").is_dir():
        pytest.skip(f"needs real data and weights: no such folder {folder} (FISHERTUNE_SHARED)")
    return folder


@pytest.fixture
def run_card(monkeypatch) -> Callable[[Path], dict]:
    """Returns a function that runs the code of a folder's model card there; it gives the names."""

    def run(folder: Path) -> dict:
        (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
        names: dict = {}
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            exec(code, names)
        return names

    return run


@pytest.fixture
def checkout(tmp_path) -> Path:
    """A copy of the checkout, without data and outputs of runs. A test may write into it."""
    left_out = (".*", "datasets", "outputs", "build", "dist", "__pycache__", "*.egg-info")
    root, copy = Path(__file__).resolve().parents[1], tmp_path / "checkout"
    shutil.copytree(root, copy, ignore=shutil.ignore_patterns(*left_out))
    (copy / "datasets").mkdir()
    shutil.copy(root / "datasets/README.md", copy / "datasets")
    return copy


@pytest.fixture
def furnished(checkout) -> Path:
    """A copy of the checkout with tiny data (streets, two cities of three classes) and weights."""
    rng = np.random.default_rng(0)

    def draw(image: Path, label: Path, classes: int) -> None:
        for path, shape, end in ((image, (48, 96, 3), 256), (label, (48, 96), classes)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, end, shape, dtype=np.uint8)).save(path)

    streets = checkout / "datasets/streets"
    for split, domain in (("train", "day"), *(("val", domain) for domain in DOMAINS)):
        for i in range(2 if split == "train" else 1):
            name = f"{split}/{domain}/{domain}_000000_{i:06d}"
            draw(
                streets / f"leftImg8bit/{name}_leftImg8bit.png",
                streets / f"gtFine/{name}_gtFine_labelTrainIds.png",
                19,
            )
    (streets / VERSION_FILE).write_text(GENERATOR_VERSION)
    for city in ("my_city", "my_city_at_night"):
        for i in range(2):
            draw(checkout / city / f"images/{i}.jpg", checkout / city / f"labels/{i}.png", 3)
    torch.manual_seed(0)
    public = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(public, checkout / "public.safetensors")
    return checkout


@pytest.fixture(scope="session")
def tiny_run(tiny_head, device) -> list[str]:
    """Options that shorten a training through train_net.py to seconds: keys and values in turn."""
    keys = tiny_head | {
        "MODEL.DEVICE": device,
        "MODEL.VFM.NAME": "tiny",
        "MODEL.VFM.WEIGHTS": "random",
        "MODEL.VFM.IMG_SIZE": [48, 64],
        "MODEL.VFM.PATCH_SIZE": 16,
        "INPUT.CROP.SIZE": [48, 64],
        "INPUT.MIN_SIZE_TRAIN": [48],
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 3,
        "TUNING.WARMUP_ITERS": 1,
        "FISHER.BATCHES": 1,
        "FISHER.IMS_PER_BATCH": 2,
        "TEST.MODE": "whole",
        "TEST.PICTURES": 1,
        "DATALOADER.NUM_WORKERS": 0,
    }
    return [str(word) for pair in keys.items() for word in pair]


@pytest.fixture(scope="session")
def tiny_head() -> dict[str, int]:
    """The keys of a small Mask2Former head with three classes."""
    return {
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
        "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 32,
        "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
        "MODEL.MASK_FORMER.NHEADS": 4,
        "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
        "MODEL.MASK_FORMER.DEC_LAYERS": 3,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    }


@pytest.fixture
def one_thread():
    """Sets one thread: on tensors this small, threads cost more than they save."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def vit(device) -> Callable[..., nn.Module]:
    """Returns a function that builds the same classifier of two blocks at every call."""

    def make(family: str = "vit", dtype: torch.dtype = torch.float32) -> nn.Module:
        torch.manual_seed(0)
        return _FAMILIES[family]().to(device, dtype).train()

    return make


def _eva(**options) -> nn.Module:
    # Like EVA-02: no QK normalisation, rotary embeddings.
    return timm.models.eva.Eva(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=2,
        use_rot_pos_emb=True, **options,
    )  # fmt: skip


def _plain(**options) -> nn.Module:
    return timm.models.VisionTransformer(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=2,
        **options,
    )  # fmt: skip


_FAMILIES = {
    "vit": _plain,
    "vit with registers and LayerScale": lambda: _plain(reg_tokens=2, init_values=0.1),
    "packed SwiGLU": lambda: _plain(mlp_layer=timm.layers.SwiGLUPacked),
    "fused qkv, separate biases": lambda: _eva(qkv_fused=True, swiglu_mlp=True),
    "separate q, k, v and SwiGLU": lambda: _eva(qkv_fused=False, swiglu_mlp=True, scale_mlp=True),
    # Windows of 3 x 3 patches on a map of 4 x 4 are padded and folded into the batch.
    "windowed attention": lambda: timm.models.VisionTransformerSAM(
        img_size=32, patch_size=8, num_classes=CLASSES, embed_dim=24, depth=2, num_heads=2,
        window_size=3, global_attn_indexes=(1,), use_rel_pos=True, neck_chans=8,
    ),
}  # fmt: skip


@pytest.fixture(params=list(_FAMILIES))
def family(request) -> str:
    """Each layout of a ViT's candidates in turn."""
    return request.param


@pytest.fixture
def images(device) -> Callable[[int], list[tuple[torch.Tensor, int]]]:
    """Returns a function that draws the same (image, class) pairs at every call."""

    def draw(count: int) -> list[tuple[torch.Tensor, int]]:
        generator = torch.Generator().manual_seed(1)
        pixels = [torch.randn(3, 32, 32, generator=generator) for _ in range(count)]
        return [(image.to(device), i % CLASSES) for i, image in enumerate(pixels)]

    return draw


@pytest.fixture
def loss() -> Callable[[nn.Module, Sequence], torch.Tensor]:
    """The cross entropy of each image."""

    def cross_entropy(model: nn.Module, batch: Sequence) -> torch.Tensor:
        pixels = torch.stack([image for image, _ in batch])
        labels = torch.tensor([label for _, label in batch], device=pixels.device)
        logits = model(pixels.to(next(model.parameters()).dtype))
        return nn.functional.cross_entropy(logits, labels, reduction="none")

    return cross_entropy


@pytest.fixture
def sam_folder(tmp_path) -> str:
    """An untrained SAM of two small layers, as transformers saves it."""
    from transformers import (
        SamConfig,
        SamImageProcessor,
        SamMaskDecoderConfig,
        SamModel,
        SamProcessor,
        SamPromptEncoderConfig,
        SamVisionConfig,
    )

    torch.manual_seed(0)
    sizes = {"image_size": 64, "patch_size": 16}
    config = SamConfig(
        vision_config=SamVisionConfig(
            hidden_size=32, num_hidden_layers=2, num_attention_heads=2, mlp_dim=64,
            output_channels=16, window_size=2, global_attn_indexes=[1], num_pos_feats=8, **sizes,
        ).to_dict(),
        prompt_encoder_config=SamPromptEncoderConfig(
            hidden_size=16, image_embedding_size=4, mask_input_channels=4, **sizes
        ).to_dict(),
        mask_decoder_config=SamMaskDecoderConfig(
            hidden_size=16, mlp_dim=32, num_attention_heads=2, iou_head_hidden_dim=16
        ).to_dict(),
    )  # fmt: skip
    SamModel(config).save_pretrained(tmp_path)
    images = SamImageProcessor(
        size={"longest_edge": 64}, pad_size={"height": 64, "width": 64},
        mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16},
    )  # fmt: skip
    SamProcessor(images).save_pretrained(tmp_path)
    return str(tmp_path)


_SMALL = {"embed_dim": 64, "depth": 6, "num_heads": 2}
_SMALL_FAMILIES = {
    "dinov2_vitl": {},
    "dinov2_vitg": {"mlp_ratio": 4.0},  # SwiGLU, both halves in one layer
    "dinov2_vitl_reg": {},  # registers
    "dinov3_vitl": {},  # rotary positions, query, key and value fused, no biases
    "dinov3_vith_plus": {},  # SwiGLU in two layers
    "clip_vitl": {},  # a norm before the blocks, quick GELU
    "mae_vitl": {},
    "sam_vith": {"global_attn_indexes": (2, 5), "window_size": 3},
    "eva02_vitl": {},  # rotary positions, separate query, key, value, a norm in the SwiGLU
    "eva02_clip_vitl": {},  # as eva02_vitl, with a norm inside the attention too
}


@pytest.fixture(params=_SMALL_FAMILIES)
def small_family(request, monkeypatch) -> str:
    """The name of a VFM whose model has 6 blocks of 64 channels during the test."""
    return _shrink(request.param, monkeypatch)


def _shrink(name: str, monkeypatch) -> str:
    vfm = VFMS[name]
    options = {**vfm.options, **_SMALL, **_SMALL_FAMILIES[name]}
    taps = (1, 2, 4, 5) if vfm.taps else ()
    monkeypatch.setitem(VFMS, name, replace(vfm, options=options, taps=taps))
    return name


@pytest.fixture
def small(monkeypatch) -> Callable[..., VFMBackbone]:
    """Returns a function that builds the small model of a VFM with random weights, none equal."""

    def build(name: str, weights: str = "random", seed: int = 0, **kwargs) -> VFMBackbone:
        if VFMS[name].options.get("depth") != _SMALL["depth"]:
            _shrink(name, monkeypatch)
        torch.manual_seed(seed)
        kwargs = {"img_size": (70, 70), "patch_size": 14} | kwargs
        backbone = VFMBackbone(name=name, weights=str(weights), **kwargs).eval()
        if weights == "random":
            # The initial values of norms, biases and LayerScale are all equal.
            for parameter in backbone.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return backbone

    return build
