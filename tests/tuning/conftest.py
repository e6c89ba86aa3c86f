"""Ways of tuning are tested on one thread; those that add parameters, against what they add to."""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from fishertune_d2.config import default_config
from fishertune_d2.fisher import UNITS, Selection, Units, find_candidates
from fishertune_d2.modeling.vfm import VFMS, VFMBackbone
from fishertune_d2.tuning import TuningMethod, build_tuning_method

SMALL = {"embed_dim": 32, "depth": 6, "num_heads": 2}
FAMILIES = {
    "dinov2_vitl_reg": {},  # a class token and four registers
    "eva02_vitl": {},  # rotary positions
    "sam_vith": {"global_attn_indexes": (2, 5), "window_size": 3},  # maps, no prefix
}


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this folder."""


@pytest.fixture(params=UNITS)
def select(request) -> Callable[..., Selection]:
    """Returns a function that selects random units of the parameters that ``only`` keeps."""

    def make(model: nn.Module, share: float = 0.05, only: Callable[[str], bool] = lambda _: True):
        generator = torch.Generator().manual_seed(3)
        scores = {}
        for candidate in find_candidates(model):
            score = torch.zeros(candidate.parameter.shape)
            if only(candidate.name):
                score[candidate.rows] = torch.rand(score[candidate.rows].shape, generator=generator)
            scores[candidate.name] = scores.get(candidate.name, 0) + score
        units = Units(request.param, {name: tuple(score.shape) for name, score in scores.items()})
        base = sum(p.numel() for p in model.parameters())
        return Selection.from_scores(units.mean(scores), share, base, units)

    return make


@pytest.fixture
def build_method() -> Callable[..., TuningMethod]:
    """Returns a function that builds a method by its name, with keys as TUNING__VPT__DIM=4."""

    def build(name: str, **options) -> TuningMethod:
        cfg = default_config()
        cfg.TUNING.METHOD = name
        for key, value in options.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        return build_tuning_method(cfg)

    return build


@pytest.fixture
def walk() -> Callable[..., list[Tensor]]:
    """Returns a function that passes images through a ViT, with blocks written out."""

    def through(backbone: nn.Module, images: Tensor, block: Callable) -> list[Tensor]:
        """The tapped maps, (B, D, h, w).

        Args:
            backbone: whose blocks' hooks do not run.
            images: a multiple of the patch size.
            block: what stands for a block: ``(i, module, tokens, rope)`` to tokens, (B, N, D).
        """
        vit = backbone.vit
        tokens = vit._pos_embed(vit.patch_embed(images))
        tokens, rope = tokens if isinstance(tokens, tuple) else (tokens, None)
        tokens, maps = vit.norm_pre(tokens), []
        for i, module in enumerate(vit.blocks):
            tokens = block(i, module, tokens, rope)
            if i in backbone.taps:
                patches = tokens[:, backbone.num_prefix_tokens :].mT
                h, w = (side // backbone.patch_size for side in images.shape[-2:])
                maps.append(patches.unflatten(2, (h, w)))
        return maps

    return through


@pytest.fixture
def attention_by_hand() -> Callable[..., Tensor]:
    """Returns a function that computes the first half of a timm block, head by head."""

    def attend(
        block: nn.Module, x: Tensor, rope: Tensor | None, patches: slice, attended: slice
    ) -> Tensor:
        """(B, N, D) -> (B, N, D).

        Args:
            block: a block of a ViT or an EVA without a norm inside the attention.
            x: its input.
            rope: rotary positions of the patches, if it uses them.
            patches: which tokens those are.
            attended: which tokens have keys and values.
        """
        attn, y = block.attn, block.norm1(x)
        if getattr(attn, "q_proj", None) is not None:
            projected = attn.q_proj(y), attn.k_proj(y), attn.v_proj(y)
        else:
            projected = attn.qkv(y).chunk(3, dim=-1)
        outputs = []
        for q, k, v in zip(*(p.chunk(attn.num_heads, dim=-1) for p in projected), strict=True):
            if rope is not None:
                q, k = q.clone(), k.clone()
                for part in (q, k):
                    part[:, patches] = apply_rot_embed_cat(part[:, patches], rope, attn.rotate_half)
            scores = q @ k[:, attended].mT / q.shape[-1] ** 0.5
            outputs.append(scores.softmax(dim=-1) @ v[:, attended])
        return x + _scaled(block, 1, attn.proj(torch.cat(outputs, dim=-1)))

    return attend


@pytest.fixture
def mlp_by_hand() -> Callable[[nn.Module, Tensor], Tensor]:
    """Returns a function that computes the second half of a timm block."""
    return lambda block, x: x + _scaled(block, 2, block.mlp(_norm(block.norm2, x)))


def _norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    # Not norm(x), which would call its hooks.
    return nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)


def _scaled(block: nn.Module, part: int, x: Tensor) -> Tensor:
    """LayerScale, which EVA calls gamma and may not have."""
    if hasattr(block, f"ls{part}"):
        return getattr(block, f"ls{part}")(x)
    gamma = getattr(block, f"gamma_{part}")
    return x if gamma is None else gamma * x


@pytest.fixture
def segmentor(tiny_head, device, monkeypatch) -> Callable[..., tuple[CfgNode, nn.Module]]:
    """Returns a function that builds (cfg, segmentor), the same numbers every time."""

    def make(method: str, vfm: str = "dinov2_vitl_reg") -> tuple[CfgNode, nn.Module]:
        entry = VFMS[vfm]
        options = {**entry.options, **SMALL, **FAMILIES[vfm]}
        taps = (1, 2, 4, 5) if entry.taps else ()
        monkeypatch.setitem(VFMS, vfm, replace(entry, options=options, taps=taps))
        cfg = default_config()
        keys = {
            **tiny_head,
            "MODEL.DEVICE": device,
            "MODEL.VFM.NAME": vfm,
            "MODEL.VFM.WEIGHTS": "random",
            "MODEL.VFM.IMG_SIZE": [48, 64],
            "TUNING.METHOD": method,
        }
        cfg.merge_from_list([part for pair in keys.items() for part in pair])
        torch.manual_seed(0)
        model = build_model(cfg)
        for parameter in model.backbone.parameters():
            # As they are initialised, norms, biases and LayerScale are all alike.
            parameter.data += 0.1 * torch.randn_like(parameter)
        return cfg, model

    return make


class _Refined(nn.Module):
    """A block, and what is added to its patches, without a hook."""

    def __init__(self, block: nn.Module, prefix: int, change: Callable[[Tensor], Tensor]):
        super().__init__()
        self.block, self.prefix, self.change = block, prefix, change

    def forward(self, *args, **kwargs) -> Tensor:
        output = self.block(*args, **kwargs).clone()
        tokens = output.view(len(output), -1, output.shape[-1])
        for image in tokens:
            for patch in image[self.prefix :]:
                patch += self.change(patch.clone())
        return output


def naively_refined(backbone: VFMBackbone, change: Callable[[Tensor, int], Tensor]) -> VFMBackbone:
    """A copy of a frozen backbone in which ``change(patch, block)``, of shape (D,), is added."""
    copy = deepcopy(backbone)
    for i, block in enumerate(copy.vit.blocks):
        copy.vit.blocks[i] = _Refined(
            block, copy.num_prefix_tokens, lambda patch, i=i: change(patch, i)
        )
    return copy
