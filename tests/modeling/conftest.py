"""One tiny model of each family of foundation models."""

from dataclasses import replace

import pytest
import torch

from fishertune_d2.modeling.vfm import VFMS, VFMBackbone

SMALL = {"embed_dim": 64, "depth": 6, "num_heads": 2}
FAMILIES = {
    "dinov2_vitl": {},
    "dinov2_vitg": {"mlp_ratio": 4.0},  # SwiGLU, both halves in one layer
    "dinov2_vitl_reg": {},  # registers
    "dinov3_vitl": {},  # rotary positions, query, key and value fused, no biases
    "dinov3_vith_plus": {},  # SwiGLU in two layers
    "clip_vitl": {},  # a norm before the blocks, quick GELU
    "mae_vitl": {},
    "sam_vith": {"global_attn_indexes": (2, 5), "window_size": 3},
    "eva02_vitl": {},  # rotary positions, query, key and value apart, a norm inside the SwiGLU
    "eva02_clip_vitl": {},  # and one inside the attention
}


@pytest.fixture(params=FAMILIES)
def family(request, monkeypatch) -> str:
    """The name of a row whose model has 6 blocks of 64 channels for the time of a test."""
    return shrink(request.param, monkeypatch)


def shrink(name: str, monkeypatch) -> str:
    row = VFMS[name]
    options = {**row.options, **SMALL, **FAMILIES[name]}
    taps = (1, 2, 4, 5) if row.taps else ()
    monkeypatch.setitem(VFMS, name, replace(row, options=options, taps=taps))
    return name


@pytest.fixture
def small(monkeypatch):
    """Builds the tiny model of a family, all of its numbers random and none equal."""

    def build(name: str, weights: str = "random", seed: int = 0, **kwargs) -> VFMBackbone:
        if VFMS[name].options.get("depth") != SMALL["depth"]:
            shrink(name, monkeypatch)
        torch.manual_seed(seed)
        kwargs = {"img_size": (70, 70), "patch_size": 14} | kwargs
        backbone = VFMBackbone(name=name, weights=str(weights), **kwargs).eval()
        if weights == "random":
            # As they are initialised, norms, biases and LayerScale are all alike.
            for parameter in backbone.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
        return backbone

    return build
