"""SoMA against the eigenvectors of W^T W, which need no SVD, on every family of ViTs."""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fishertune_d2.config import default_config, read_config
from fishertune_d2.engine.parameter_counts import count_parameters
from fishertune_d2.engine.run_keys import Result, differing_keys
from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.modeling import VFMS, VFMBackbone
from fishertune_d2.modeling.plain_vit import PlainViTs
from fishertune_d2.tuning.split_qkv import split_qkv

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RANK = 4
VITS = [name for name, vfm in VFMS.items() if isinstance(vfm.family, PlainViTs)]
IMAGES = torch.randn(2, 3, 42, 56, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def attached(small, build_method):
    """Returns a function that builds a family's small model and attaches SoMA of rank 4 to it."""

    def build(family: str, dtype: torch.dtype = torch.float64, noise: float = 0.0):
        """``noise`` moves A, B and b away from where they start."""
        method = build_method("soma", TUNING__SOMA__RANK=RANK)
        backbone = small(family).to(dtype).requires_grad_(False)
        method.attach(backbone)
        torch.manual_seed(1)
        for parameter in method.parameters(backbone).values():
            parameter.data += noise * torch.randn_like(parameter)
        return method, backbone

    return build


def _layers(backbone: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a plain model whose blocks from a third of the depth on are split."""
    split_qkv(backbone.vit, first=2)
    return {
        name: layer
        for name, layer in backbone.named_modules()
        if name.startswith(tuple(f"vit.blocks.{i}." for i in range(2, 6)))
        and isinstance(layer, nn.Linear)
    }


def _minor(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The RANK smallest singular values, from the smallest, and the sum of their components."""
    tall = weight.detach() if len(weight) >= weight.shape[1] else weight.detach().T
    squares, vectors = torch.linalg.eigh(tall.T @ tall)  # from the smallest
    v = vectors[:, :RANK]
    minor = tall @ v @ v.T
    return squares[:RANK].sqrt(), minor if len(weight) >= weight.shape[1] else minor.T


def _parts(backbone: nn.Module, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """W_res, B and A of a layer."""
    layer = backbone.get_submodule(name)
    return layer.base_layer.weight, layer.lora_B["default"].weight, layer.lora_A["default"].weight


def test_the_weight_is_divided_at_its_smallest_singular_values(small_family, small, attached):
    plain, (_, tuned) = small(small_family).double(), attached(small_family)
    for name, layer in _layers(plain).items():
        residual, b, a = _parts(tuned, name)
        assert a.dtype == b.dtype == torch.float64
        torch.testing.assert_close(residual + b @ a, layer.weight, rtol=0, atol=1e-14)
        smallest, minor = _minor(layer.weight)
        torch.testing.assert_close(b @ a, minor, rtol=0, atol=1e-10)
        found = torch.linalg.svdvals(b @ a).flip(0)
        torch.testing.assert_close(found[-RANK:], smallest, rtol=0, atol=1e-10)
        assert found[:-RANK].max() < 1e-12
        # Each half has the root of the values: B^T B = A A^T = S_r.
        for half in (b.T @ b, a @ a.T):
            torch.testing.assert_close(half, smallest.flip(0).diag(), rtol=0, atol=1e-10)


def test_computes_the_published_formula(small_family, small, attached):
    plain = small(small_family).double()
    _, tuned = attached(small_family, noise=0.1)
    for name, layer in _layers(plain).items():
        _, b, a = _parts(tuned, name)
        layer.weight.data += b @ a - _minor(layer.weight)[1]
        if layer.bias is not None:
            layer.bias.data = tuned.get_submodule(name).base_layer.bias.data
    with torch.no_grad():
        expected, maps = plain(IMAGES.double()), tuned(IMAGES.double())
    for name, value in expected.items():
        torch.testing.assert_close(maps[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_begins_where_the_frozen_model_is(small_family, small, attached, dtype, close):
    backbones = small(small_family).to(dtype), attached(small_family, dtype)[1]
    with torch.no_grad():
        plain, maps = (backbone(IMAGES.to(dtype)) for backbone in backbones)
    for name, value in plain.items():
        torch.testing.assert_close(maps[name], value, rtol=close, atol=close)


def test_factors_and_biases_of_the_deeper_blocks_train_and_nothing_else(
    small_family, small, attached
):
    method, tuned = attached(small_family)
    expected = set()
    for name, layer in _layers(small(small_family)).items():
        expected |= {f"{name}.lora_A.default.weight", f"{name}.lora_B.default.weight"}
        expected |= {f"{name}.base_layer.bias"} if layer.bias is not None else set()
    parameters = method.parameters(tuned)
    assert set(parameters) == expected
    sum(m.square().sum() for m in tuned(IMAGES.double()).values()).backward()
    reached = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert reached == expected
    # A key's bias adds the same to all scores of a query, so its gradient is 0 but for rounding.
    moved = {n: p for n, p in parameters.items() if not n.endswith("k_proj.base_layer.bias")}
    assert all(p.grad.abs().max() > 0 for p in moved.values())


def test_merging_leaves_a_plain_model_that_computes_the_same(small_family, small, attached):
    plain, (method, tuned) = small(small_family).double(), attached(small_family, noise=0.1)
    before = plain.state_dict()
    with torch.no_grad():
        expected = tuned(IMAGES.double())
        method.merge(tuned)
        merged = tuned(IMAGES.double())
    after = tuned.state_dict()
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    for name, value in expected.items():
        torch.testing.assert_close(merged[name], value, rtol=1e-9, atol=1e-9)
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    deep = tuple(f"vit.blocks.{i}." for i in range(2, 6))
    assert moved and all(name.startswith(deep) and "norm" not in name for name in moved)


def test_a_state_dict_holds_the_residual(attached):
    first, second = (attached("eva02_vitl", noise=noise)[1] for noise in (0.1, 0.2))
    for name, tensor in second.state_dict().items():
        if name.endswith("base_layer.weight"):
            tensor.zero_()
    second.load_state_dict(first.state_dict())
    with torch.no_grad():
        expected = first(IMAGES.double())["res5"]
        assert torch.equal(second(IMAGES.double())["res5"], expected)
        assert torch.equal(copy.deepcopy(first)(IMAGES.double())["res5"], expected)


def test_the_published_count_on_vit_l():
    cfg = default_config()
    cfg.TUNING.METHOD = "soma"
    counts = count_parameters(cfg)  # on DINOv2 ViT-L, as the config's default is
    # In each of 16 blocks: q, k, v and proj, fc1 and fc2, and their biases.
    block = 16 * (4 * (1024 + 1024) + 2 * (1024 + 4096)) + 4 * 1024 + 4096 + 1024
    assert counts["tuned_parameters"] == 16 * block == 4_866_048


@pytest.mark.parametrize("name", VITS)
def test_adds_on_the_meta_device_to_every_foundation_model(name, build_method):
    with torch.device("meta"):
        backbone = VFMBackbone(name=name, weights="random", img_size=(64, 64), patch_size=16)
        method = build_method("soma")
        method.attach(backbone)
    parameters = method.parameters(backbone)
    blocks = sorted({int(name.split(".")[2]) for name in parameters})
    depth = len(backbone.vit.blocks)
    assert blocks == list(range(depth // 3, depth))
    assert all(p.is_meta for p in parameters.values())


def test_refuses_a_rank_that_no_layer_has(small, build_method):
    with pytest.raises(ValueError, match="TUNING.SOMA.RANK is 0: choose above 0"):
        build_method("soma", TUNING__SOMA__RANK=0)
    method = build_method("soma", TUNING__SOMA__RANK=65)
    with pytest.raises(ValueError, match="RANK is 65: the smallest layer .* has 64 singular"):
        method.attach(small("mae_vitl"))


@pytest.mark.parametrize("vfm", ["dinov2", "eva02"])
def test_configs_follow_the_authors_recipe(vfm):
    path = CONFIGS / f"soma_{vfm}.yaml"
    cfg, text = read_config(str(path)), path.read_text()
    solver, tuning = cfg.SOLVER, cfg.TUNING
    assert (cfg.MODEL.VFM.NAME, tuning.METHOD) == (f"{vfm}_vitl", "soma")
    assert (tuning.SOMA.RANK, tuning.WARMUP_ITERS) == (16, 0)
    assert (solver.BASE_LR, solver.BACKBONE_MULTIPLIER) == (1e-4, 0.5)
    assert (solver.WEIGHT_DECAY, solver.WEIGHT_DECAY_END) == (0.05, 1e-5)
    assert (solver.EMA, solver.EMA_START) == (0.9998, 12_000)
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.POLY_LR_POWER) == (40_000, 4, 0.9)
    counts = count_parameters(cfg)
    trained, own = (counts[f"{key}_parameters"] / 1e6 for key in ("tuned", "backbone"))
    assert (
        f"\n# Tunes: {trained:.2f} M weights: added factors, and biases of the {own:.2f} M " in text
    )
    assert f"python train_net.py --config-file configs/{path.name} [--num-gpus N]\n" in text


def test_the_config_of_camvid_shares_the_warm_up_of_the_other_methods():
    cfg, freeze = read_config("camvid/soma.yaml"), read_config("camvid/freeze.yaml")
    assert (cfg.TUNING.METHOD, cfg.OUTPUT_DIR) == ("soma", "outputs/camvid/soma")
    assert cfg.SOLVER.WEIGHT_DECAY_END == 1e-5 and cfg.TUNING.WARMUP_CHECKPOINT
    record, other = (RunRecord.of_run(each, None, None) for each in (freeze, cfg))
    assert not differing_keys(record.config, other.config, Result.WARMUP)
