"""LoRA and other tuners of peft against their published formulas, on every family of ViTs."""

import copy

import pytest
import torch
from torch import Tensor, nn

from fishertune_d2.config import default_config
from fishertune_d2.engine.parameter_counts import count_parameters
from fishertune_d2.fisher import find_candidates
from fishertune_d2.modeling import VFMS, VFMBackbone
from fishertune_d2.modeling.plain_vit import PlainViTs
from fishertune_d2.tuning import TuningMethod, build_tuning_method
from fishertune_d2.tuning.peft_tuners import _usable_tuners
from fishertune_d2.tuning.split_qkv import PROJECTIONS, join_qkv, split_qkv

VITS = [name for name, vfm in VFMS.items() if isinstance(vfm.family, PlainViTs)]


class _Backbone(nn.Module):
    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit.requires_grad_(False)


@pytest.fixture
def backbone(vit):
    """Returns a function that wraps the classifier of two blocks in float64."""
    return lambda family="vit": _Backbone(vit(family, torch.float64).eval())


@pytest.fixture
def x(images) -> Tensor:
    """Two images."""
    return torch.stack([image for image, _ in images(2)]).double()


def _cfg(**options):
    cfg = default_config()
    for key, value in options.items():
        cfg.merge_from_list([f"TUNING.{key.replace('__', '.')}", value])
    return cfg


def _method(name: str, *options, **keys) -> TuningMethod:
    """LoRA, or a tuner with options of peft's."""
    if name != "lora":
        keys |= {"METHOD": "peft", "PEFT__TYPE": name, "PEFT__OPTIONS": list(options)}
        return build_tuning_method(_cfg(**keys))
    return build_tuning_method(_cfg(METHOD="lora", **keys))


def _attach(method: TuningMethod, backbone: nn.Module, seed: int = 1) -> dict[str, nn.Parameter]:
    """Attaches, and gives what was added numbers that are not those of the beginning."""
    torch.manual_seed(seed)
    method.attach(backbone)
    added = method.parameters(backbone)
    for parameter in added.values():
        parameter.data = torch.randn_like(parameter, dtype=torch.float64) / 3
    return added


def _added(backbone: nn.Module, block: int, target: str) -> dict[str, Tensor]:
    """What was added to a layer, by the last names; buffers too."""
    names = (f"blocks.{block}.attn.qkv.{target}.", f"blocks.{block}.attn.{target}.")
    return {
        name.removesuffix(".weight").removesuffix(".default").rpartition(".")[2]: tensor
        for name, tensor in backbone.vit.state_dict().items()
        if name.startswith(names) and "base_layer" not in name
    }


def _lora(w: Tensor, lora_A: Tensor, lora_B: Tensor) -> Tensor:  # noqa: N803 - peft's names
    return w + 6 / 4 * lora_B @ lora_A


def _dora(w: Tensor, lora_A: Tensor, lora_B: Tensor, lora_magnitude_vector: Tensor) -> Tensor:  # noqa: N803
    direction = w + 6 / 4 * lora_B @ lora_A
    return lora_magnitude_vector[:, None] * direction / direction.norm(dim=1, keepdim=True)


def _vera(w: Tensor, vera_A: Tensor, vera_B: Tensor, vera_lambda_b, vera_lambda_d) -> Tensor:  # noqa: N803
    a, b = vera_A.double()[:, : w.shape[1]], vera_B.double()[: w.shape[0]]
    return w + vera_lambda_b[:, None] * (b @ (vera_lambda_d[:, None] * a))


def _loha(w: Tensor, hada_w1_a, hada_w1_b, hada_w2_a, hada_w2_b) -> Tensor:
    return w + 6 / 4 * (hada_w1_a @ hada_w1_b) * (hada_w2_a @ hada_w2_b)


FORMULAS = {
    "lora": (_lora, lambda: _method("lora", LORA__RANK=4, LORA__ALPHA=6)),
    "dora": (_dora, lambda: _method("dora", "r", 4, "lora_alpha", 6)),
    "vera": (_vera, lambda: _method("vera", "r", 4)),
    "loha": (_loha, lambda: _method("LoHa", "r", 4, "alpha", 6)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_computes_the_published_formula_on_queries_and_values(name, family, backbone, x):
    formula, make = FORMULAS[name]
    plain, tuned = backbone(family), backbone(family)
    _attach(make(), tuned)
    with torch.no_grad():
        for candidate in find_candidates(plain):
            if candidate.kind in "QV" and candidate.parameter.dim() == 2:
                target = {"Q": "q_proj", "V": "v_proj"}[candidate.kind]
                weight = candidate.parameter[candidate.rows]
                weight.copy_(formula(weight, **_added(tuned, candidate.block, target)))
        torch.testing.assert_close(tuned.vit(x), plain.vit(x), rtol=1e-10, atol=1e-10)


def test_ia3_scales_what_leaves_attention_and_enters_the_feed_forward_network(backbone, x):
    method = _method("IA3", PEFT__TARGETS=["k_proj", "v_proj", "fc2"])
    plain, tuned = backbone(), backbone()
    added = _attach(method, tuned)
    assert len(added) == 3 * 2
    with torch.no_grad():
        for i, block in enumerate(plain.vit.blocks):
            scales = [next(iter(_added(tuned, i, t).values())) for t in ("k_proj", "v_proj")]
            for part, scale in zip((1, 2), scales, strict=True):
                block.attn.qkv.weight[24 * part : 24 * (part + 1)] *= scale
                block.attn.qkv.bias[24 * part : 24 * (part + 1)] *= scale[:, 0]
            block.mlp.fc2.weight *= added[f"vit.blocks.{i}.mlp.fc2.ia3_l.default"]
        torch.testing.assert_close(tuned.vit(x), plain.vit(x), rtol=1e-10, atol=1e-10)


def test_begins_where_the_frozen_model_is_and_moves_nothing_else(family, backbone, x):
    plain, tuned = backbone(family), backbone(family)
    method = _method("lora")
    method.attach(tuned)
    tuned.double()
    torch.testing.assert_close(tuned.vit(x), plain.vit(x), rtol=1e-12, atol=1e-12)
    added = _attach(_method("lora"), tuned := backbone(family))
    assert len(added) == 2 * 2 * 2  # A and B, of q and v, in two blocks
    tuned.vit(x).square().sum().backward()
    trained = {name for name, p in tuned.named_parameters() if p.grad is not None}
    assert trained == added.keys()
    assert all(parameter.grad.abs().max() > 0 for parameter in added.values())


@pytest.mark.parametrize("name", FORMULAS)
def test_merging_leaves_a_plain_model_that_computes_the_same(name, family, backbone, x):
    method = FORMULAS[name][1]()
    plain, tuned = backbone(family), backbone(family)
    _attach(method, tuned)
    expected = tuned.vit(x)
    method.merge(tuned)
    before, after = plain.vit.state_dict(), tuned.vit.state_dict()
    assert [(n, t.shape) for n, t in before.items()] == [(n, t.shape) for n, t in after.items()]
    torch.testing.assert_close(tuned.vit(x), expected, rtol=1e-10, atol=1e-10)
    candidates = find_candidates(plain.vit)
    moved = {c.name for c in candidates if c.kind in "QV" and c.parameter.dim() == 2}
    assert {n for n in before if not torch.equal(before[n], after[n])} == moved
    for candidate in candidates:
        if candidate.kind == "K":
            rows = after[candidate.name][candidate.rows]
            assert torch.equal(candidate.parameter[candidate.rows], rows)


@pytest.mark.parametrize("name", FORMULAS)
def test_a_state_dict_fits_the_same_method(name, backbone, x):
    method = FORMULAS[name][1]()
    first, second = backbone(), backbone()
    _attach(method, first)
    _attach(method, second, seed=2)
    assert not torch.equal(first.vit(x), second.vit(x))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.vit(x), second.vit(x))
    assert torch.equal(copy.deepcopy(first).vit(x), first.vit(x))


def test_splitting_takes_no_memory_and_joining_undoes_it(family, backbone):
    vit, plain = backbone(family).vit, backbone(family).vit
    names = [name for name, _ in plain.named_parameters()]
    storages = {p.untyped_storage().data_ptr() for p in vit.parameters()}
    split_qkv(vit)
    assert {p.untyped_storage().data_ptr() for p in vit.parameters()} == storages
    parts = {name.rpartition(".")[2] for name, _ in vit.named_modules()}
    assert parts.issuperset(PROJECTIONS)
    join_qkv(vit)
    assert sorted(name for name, _ in vit.named_parameters()) == sorted(names)
    assert all(torch.equal(t, vit.state_dict()[n]) for n, t in plain.state_dict().items())


def test_the_papers_count_on_vit_l():
    counts = count_parameters(_cfg(METHOD="lora"))  # on DINOv2 ViT-L, as the config's default is
    assert counts == {"tuned_parameters": 786_432, "backbone_parameters": 304_199_680 - 1024}


def test_the_output_of_attention_is_tuned_without_the_patch_embedding(backbone):
    added = _attach(_method("IA3", PEFT__TARGETS=["proj", "fc1"]), tuned := backbone())
    blocks = range(len(tuned.vit.blocks))
    layers = {name.partition(".ia3_l")[0] for name in added}
    assert layers == {f"vit.blocks.{i}.{n}" for i in blocks for n in ("attn.proj", "mlp.fc1")}


@pytest.mark.parametrize("name", VITS)
def test_works_on_every_foundation_model(name):
    with torch.device("meta"):
        backbone = VFMBackbone(name=name, weights="random", img_size=(64, 64), patch_size=16)
        method = _method("lora")
        method.attach(backbone)
    added = sum(p.numel() for p in method.parameters(backbone).values())
    assert added == len(backbone.vit.blocks) * 2 * 8 * 2 * backbone.vit.embed_dim


@pytest.mark.parametrize("name", _usable_tuners())
def test_adds_on_the_meta_device_what_it_adds_on_a_real_one(name):
    options = {"C3A": ["block_size", 16], "VBLORA": ["vector_length", 16]}.get(name, [])
    shapes = []
    for device in ("cpu", "meta"):
        method = _method(name, *options)
        with torch.device(device):
            size = {"img_size": (48, 64), "patch_size": 16}
            tuned = VFMBackbone(name="tiny", weights="random", **size)
            method.attach(tuned)
        assert {p.device.type for p in tuned.parameters()} == {device}
        shapes.append({n: p.shape for n, p in method.parameters(tuned).items()})
    assert shapes[0]
    assert shapes[0] == shapes[1]


def test_refuses(backbone):
    with pytest.raises(ValueError, match="TYPE is 'lorra': choose from BEFT, .*VERA, .*, DORA"):
        _method("lorra")
    with pytest.raises(ValueError, match="TYPE is 'ADALORA'.*calls between the steps"):
        _method("ADALORA")
    with pytest.raises(ValueError, match="OPTIONS names rank, s: LOHA has .*, r, rank_dropout,"):
        _method("LOHA", "rank", 3, "s", 1)
    with pytest.raises(ValueError, match=r"OPTIONS is \['r'\]: give names and values in turn"):
        _method("LOHA", "r")
    with pytest.raises(ValueError, match="TARGETS names qq: this backbone has fc1, fc2, head, k_p"):
        _method("LOHA", PEFT__TARGETS=["q_proj", "qq"]).attach(backbone())
    with pytest.raises(ValueError, match="peft cannot put C3A around q_proj, v_proj: The block"):
        _method("C3A").attach(backbone())
    lily = _method("LILY")
    _attach(lily, tuned := backbone())
    with pytest.raises(ValueError, match="what LILY adds cannot be written .*: keep the run's"):
        lily.merge(tuned)


def test_says_how_to_install_peft(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'fishertune-d2\[baselines\]'"):
        _method("lora")
