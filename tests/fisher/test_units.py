"""Units against the forward passes of timm's models, and their means against plain loops."""

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from fishertune_d2.fisher import Units, find_candidates, slices_of

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 4}
FAMILIES = {
    "fused with a bias": ("vit_small_patch14_dinov2", {**SMALL, "img_size": 28}),
    "EVA-02 tiny: fused, biases of q and v": (
        "eva02_tiny_patch14_224",
        {**SMALL, "img_size": 28},
    ),
    "EVA-02 large: separate, no bias of k": (
        "eva02_large_patch14_224",
        {**SMALL, "img_size": 28},
    ),
    "SAM: windows": (
        "samvit_base_patch16",
        {**SMALL, "img_size": 64, "window_size": 3, "global_attn_indexes": (1,)},
    ),
    "DINOv2 giant: gate and value in one fc1": (
        "vit_giant_patch14_dinov2",
        {**SMALL, "img_size": 28},
    ),
    "DINOv3: fused without a bias, fc1_g and fc1_x": (
        "vit_7b_patch16_dinov3",
        {**SMALL, "img_size": 32},
    ),
}


@pytest.fixture(params=FAMILIES)
def vit(request) -> nn.Module:
    torch.manual_seed(0)
    name, options = FAMILIES[request.param]
    model = timm.create_model(name, num_classes=0, **options).eval().requires_grad_(False)
    for parameter in model.parameters():  # no bias is 0, and LayerScale hides no change
        parameter += 0.1 * torch.randn_like(parameter)
    return model


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {c.name: tuple(c.parameter.shape) for c in find_candidates(model)}


def _mask(units: Units, group: str, index: int) -> dict[str, torch.Tensor]:
    """Which weights the unit ``index`` of a group has."""
    values = {key: torch.zeros(each.count) for key, each in units.groups.items()}
    values[group][index] = 1.0
    return {name: value.bool() for name, value in units.spread(values).items()}


def _input(model: nn.Module) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = (4, 4) if "SAM" in type(model).__name__ else (5,)
    return torch.randn(1, *tokens, model.embed_dim)


def _attended(monkeypatch, block: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The channels of q, k and v in a block's forward pass, (values, channels) each."""
    seen = []
    attend = F.scaled_dot_product_attention

    def watching(q, k, v, *args, **options):
        seen.append((q, k, v))
        return attend(q, k, v, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(F, "scaled_dot_product_attention", watching)
        block(x)
    (parts,) = seen
    heads, size = SMALL["num_heads"], SMALL["embed_dim"] // SMALL["num_heads"]
    channels = [part.reshape(-1, heads, part.shape[-2], size) for part in parts]
    return {
        kind: part.transpose(1, 2).reshape(-1, heads * size)
        for kind, part in zip("QKV", channels, strict=True)
    }


def _hidden(block: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The hidden neurons behind the activation and the product with the gate, (tokens, hidden)."""
    seen = []
    handle = block.mlp.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    block.mlp(x)
    handle.remove()
    return seen[0].flatten(0, -2)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_a_neuron_of_attention_is_one_channel(vit, monkeypatch, kind):
    units, block, x = Units("neuron", _shapes(vit)), vit.blocks[1], _input(vit)
    parameters = dict(vit.named_parameters())
    for index in (0, 17, units.groups[f"blocks.1.{kind}"].count - 1):
        before = _attended(monkeypatch, block, x)
        mask = _mask(units, f"blocks.1.{kind}", index)
        for name, part in mask.items():
            parameters[name][part] += 1.0
        after = _attended(monkeypatch, block, x)
        for each, values in after.items():
            changed = (values != before[each]).any(0).nonzero().flatten().tolist()
            assert changed == ([index] if each == kind else []), (each, index)


@pytest.mark.parametrize("index", [0, 31, -1])
def test_a_neuron_of_the_feed_forward_network_is_one_hidden_value(vit, index):
    units, block, x = Units("neuron", _shapes(vit)), vit.blocks[1], _input(vit)
    parameters = dict(vit.named_parameters())
    group = units.groups["blocks.1.FFN"]
    index %= group.count
    mask = _mask(units, "blocks.1.FFN", index)
    before = _hidden(block, x)
    assert before.shape[1] == group.count
    # Without its column of fc2, the network ignores the neuron.
    normed = []
    handle = block.mlp.fc2.register_forward_pre_hook(lambda _, args: normed.append(args[0].clone()))
    block.mlp(x)
    handle.remove()
    normed[0][..., index] = 0.0
    expected = F.linear(normed[0], block.mlp.fc2.weight, block.mlp.fc2.bias)
    (fc2,) = [name for name in mask if name == "blocks.1.mlp.fc2.weight"]
    parameters[fc2][mask[fc2]] = 0.0
    torch.testing.assert_close(block.mlp(x), expected)

    for name, part in mask.items():
        parameters[name][part] += 1.0
    after = _hidden(block, x)
    assert (after != before).any(0).nonzero().flatten().tolist() == [index]
    # Each of its rows matters alone.
    for name in (name for name, part in mask.items() if part.any() and name != fc2):
        for row in (
            mask[name].flatten(1).any(1).nonzero() if mask[name].dim() == 2 else [mask[name]]
        ):
            now = _hidden(block, x)
            parameters[name][row] += 1.0
            changed = (_hidden(block, x) != now).any(0).nonzero().flatten().tolist()
            assert changed == [index], name


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_units_are_disjoint_and_cover_all_but_the_bias_of_fc2(vit, unit):
    shapes = _shapes(vit)
    units = Units(unit, shapes)
    numbers, start = {}, 1
    for key, group in units.groups.items():
        numbers[key] = torch.arange(start, start + group.count)
        start += group.count
    if unit == "weight":
        numbers = {key: each.view(shapes[key]) for key, each in numbers.items()}
    spread = units.spread(numbers)
    assert {name: tuple(value.shape) for name, value in spread.items()} == shapes
    for name, value in spread.items():
        free = unit == "neuron" and name.endswith("fc2.bias")
        assert (value == 0).all() if free else (value > 0).all(), name
    weights = torch.cat([value.flatten() for value in spread.values()]).bincount(minlength=start)
    for key, group in units.groups.items():
        assert (weights[numbers[key]] == group.size).all(), key


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_layers_have_each_unit_once_with_the_sizes_of_the_candidates(vit, unit):
    units = Units(unit, _shapes(vit))
    left = {key: torch.zeros(each.count) for key, each in units.groups.items()}
    if unit == "weight":
        left = {key: each.view(units.shapes[key]) for key, each in left.items()}
    sizes = {}
    for layer, members in units.layers.items():
        for key, rows in members:
            left[key][rows] += 1
            size = left[key][rows].numel() * units.groups[key].size
            sizes[layer] = sizes.get(layer, 0) + size
    assert all((each == 1).all() for each in left.values())
    expected = {}
    for candidate in find_candidates(vit):
        if unit == "weight" or not candidate.name.endswith("fc2.bias"):
            layer = (candidate.kind, candidate.block)
            expected[layer] = expected.get(layer, 0) + candidate.numel
    assert sizes == expected


def test_counts_of_a_vit_l():
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_dinov2", num_classes=0)
    groups = Units("neuron", _shapes(vit)).groups
    assert sum(group.count for group in groups.values()) == 24 * (3 * 1024 + 4096)
    # All candidates but the biases of fc2.
    assert sum(g.count * g.size for g in groups.values()) == 277_020_672 - 24 * 1024
    assert {group.size for key, group in groups.items() if key.endswith("FFN")} == {2 * 1024 + 1}


def test_two_backbones_of_one_model_have_neurons_of_their_own():
    pair = nn.ModuleDict({k: timm.create_model("test_vit", num_classes=0) for k in "ab"})
    groups = Units("neuron", _shapes(pair)).groups
    assert {key[:11] for key in groups} == {f"{k}.blocks.{i}." for k in "ab" for i in range(6)}
    assert {group.count for group in groups.values()} == {64, 192}


def test_mean_and_spread_against_loops(vit):
    units = Units("neuron", _shapes(vit))
    torch.manual_seed(0)
    values = {name: torch.rand(shape) for name, shape in units.shapes.items()}
    means = units.mean(values)
    spread = units.spread(means)
    for key in ("blocks.0.Q", "blocks.0.K", "blocks.1.V", "blocks.1.FFN"):
        width, fused = SMALL["embed_dim"], f"{key[:8]}.attn.qkv.weight" in units.shapes
        for index in (0, 5, units.groups[key].count - 1):
            total, entries = 0.0, []
            for name, value in values.items():
                if name.startswith(f"{key[:8]}."):
                    entries += [
                        (name, place)
                        for place in _places(name, key[9:], index, width, fused, value.shape)
                    ]
            for name, place in entries:
                total += values[name][place].double().sum().item()
            count = sum(values[name][place].numel() for name, place in entries)
            assert means[key].shape == (units.groups[key].count,)
            assert means[key][index].item() == pytest.approx(total / count, rel=1e-6)
            for name, place in entries:
                assert (spread[name][place] == means[key][index]).all()


def _places(name: str, kind: str, index: int, width: int, fused: bool, shape) -> list:
    """Where a neuron is in a parameter, by the names of the layers alone."""
    layer = name.split(".", 2)[2]
    if kind in "QKV":
        own = {f"attn.{kind.lower()}_proj.weight", f"attn.{kind.lower()}_proj.bias"}
        own |= {f"attn.{kind.lower()}_bias"}
        if layer in own:
            return [index]
        return ["QKV".index(kind) * width + index] if layer.startswith("attn.qkv") else []
    if layer == "mlp.fc2.weight":
        return [(slice(None), index)]
    if layer.startswith("mlp.fc1_"):
        return [index]
    if layer.startswith("mlp.fc1."):
        return [index, index + 128] if shape[0] == 256 else [index]
    return []


def test_values_of_single_weights_stay_as_they_are():
    values = {"a": torch.rand(2, 3), "b": torch.rand(4)}
    units = Units("weight", {"a": (2, 3), "b": (4,)})
    for same in (units.mean(values), units.spread(values)):
        assert same.keys() == values.keys()
        assert all(same[name] is values[name] for name in values)


def test_slices_of_a_matrix():
    matrix = torch.arange(6).view(2, 3)
    assert slices_of(matrix, None).tolist() == [0, 1, 2, 3, 4, 5]
    assert slices_of(matrix, 0)[1].tolist() == [3, 4, 5]
    assert slices_of(matrix, 1)[1].tolist() == [1, 4]


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"w": (2, 2)}, "no parameter is named blocks"),
        ({"blocks.0.mlp.fc1.weight": (6, 2)}, "blocks.0.mlp.fc2.weight is no matrix"),
        (
            {"blocks.0.mlp.fc1.weight": (5, 2), "blocks.0.mlp.fc2.weight": (2, 3)},
            "fc1.weight has 5 rows, which are not those of 3 neurons",
        ),
        (
            {"blocks.0.attn.qkv.weight": (6, 2), "blocks.0.attn.q_bias": (3,)},
            "q_bias has 3 neurons, but other parameters of blocks.0.Q have 2",
        ),
        ({"blocks.0.attn.q_bias": ()}, "no parameter is named blocks"),
    ],
)
def test_refuses_parameters_without_whole_neurons(shapes, message):
    with pytest.raises(ValueError, match=message):
        Units("neuron", shapes)


def test_refuses_an_unknown_unit():
    with pytest.raises(ValueError, match="unknown unit 'head': choose from weight, neuron"):
        Units("head", {"w": (2, 2)})
