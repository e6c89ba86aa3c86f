import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor, nn

from fishertune_d2.analysis.neuron_map import (
    Neuron,
    draw_heads,
    draw_neurons,
    most_sensitive,
    neuron_activations,
    shares_by_head,
)
from fishertune_d2.fisher import FisherEstimate, Selection, Units, find_candidates

HEADS, PATCH = 2, 8  # of the fixture `vit`


class _Backbone(nn.Module):
    patch_size = PATCH

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        bottom, right = (-side % PATCH for side in images.shape[-2:])
        return self.vit.forward_features(nn.functional.pad(images, (0, right, 0, bottom)))


class _Segmentor(nn.Module):
    """What `neuron_activations` reads of one."""

    def __init__(self, vit: nn.Module):
        super().__init__()
        self.backbone = _Backbone(vit)
        like = next(vit.parameters())
        self.device = like.device
        self.register_buffer("pixel_mean", like.new_full((3, 1, 1), 100.0))
        self.register_buffer("pixel_std", like.new_full((3, 1, 1), 50.0))


@pytest.fixture
def streets() -> dict[str, dict]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: {"image": torch.randint(0, end, (3, 30, 28), dtype=torch.uint8, generator=generator)}
        for name, end in (("day", 256), ("dusk", 80))
    }


def _neurons() -> list[Neuron]:
    groups = [("FFN", 3), ("K", 5), ("Q", 0), ("FFN", 40), ("V", 23)]
    return [Neuron(f"vit.blocks.1.{kind}", index, 1.0) for kind, index in groups]


def _shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {c.name: tuple(c.parameter.shape) for c in find_candidates(model)}


def _hidden(mlp: nn.Module, tokens: Tensor) -> Tensor:
    """The hidden activations as their papers write them."""
    if hasattr(mlp, "fc1_g"):
        hidden = nn.functional.silu(mlp.fc1_g(tokens)) * mlp.fc1_x(tokens)
    elif mlp.fc1.out_features == 2 * mlp.fc2.in_features:
        gate, value = mlp.fc1(tokens).chunk(2, dim=-1)
        hidden = mlp.act(gate) * value  # timm gives this layer the ViT's nonlinearity
    else:
        hidden = nn.functional.gelu(mlp.fc1(tokens))
    return mlp.norm(hidden)


def _projected(attention: nn.Module, kind: str, tokens: Tensor) -> Tensor:
    if hasattr(attention, "q_proj") and attention.q_proj is not None:
        return getattr(attention, f"{kind.lower()}_proj")(tokens)
    weight = attention.qkv.weight.chunk(3)["QKV".index(kind)]
    bias = torch.zeros(())
    if attention.qkv.bias is not None:
        bias = attention.qkv.bias.chunk(3)["QKV".index(kind)]
    elif kind != "K":  # EVA's keys have none
        bias = getattr(attention, f"{kind.lower()}_bias")
    return tokens @ weight.T + bias.to(tokens)


def test_activations_are_those_of_a_manual_forward_for_every_family(
    vit, family, streets, one_thread
):
    model = _Segmentor(vit(family, torch.float64))
    block, caught = model.backbone.vit.blocks[1], {}
    block.register_forward_pre_hook(lambda module, inputs: caught.update(attn=inputs[0]))
    block.mlp.register_forward_pre_hook(lambda module, inputs: caught.update(mlp=inputs[0]))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # the initial biases are 0
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.data += 0.1 * noise.to(parameter.device)
    for item in streets.values():
        (found,) = neuron_activations(model, _neurons(), [item])
        pixels = (item["image"].to(model.device) - model.pixel_mean) / model.pixel_std
        with torch.no_grad():
            model.backbone(pixels[None])
            normed = block.norm1(caught["attn"])
            expected = [
                (
                    _hidden(block.mlp, caught["mlp"])
                    if neuron.kind == "FFN"
                    else _projected(block.attn, neuron.kind, normed)
                )[..., neuron.index].flatten()[-16:]  # without prefix tokens
                for neuron in _neurons()
            ]
        assert found.shape == (5, 4, 4)
        torch.testing.assert_close(found.flatten(1), torch.stack(expected))


@pytest.mark.parametrize("unit", ["weight", "neuron"])
def test_shares_by_head_are_those_of_plain_loops(vit, family, unit):
    model = vit(family)
    generator = torch.Generator().manual_seed(2)
    units = Units(unit, _shapes(model))
    like = units.mean(
        {name: torch.rand(s, generator=generator) for name, s in units.shapes.items()}
    )
    base = sum(c.numel for c in find_candidates(model))
    selection = Selection.from_scores(like, 0.3, base, units)
    masks = selection.masks(0.3)
    found = shares_by_head(selection, HEADS)
    for kind in "QKV":
        assert found[kind].shape == (2, HEADS)
        for block in range(2):
            for head in range(HEADS):
                chosen = total = 0
                for c in find_candidates(model):
                    if (c.kind, c.block) == (kind, block):
                        rows = range(c.rows.start + 12 * head, c.rows.start + 12 * (head + 1))
                        chosen += sum(int(masks[c.name][row].sum()) for row in rows)
                        total += sum(masks[c.name][row].numel() for row in rows)
                assert found[kind][block, head] == pytest.approx(100 * chosen / total)
                if unit == "neuron":
                    channels = selection.indices[f"blocks.{block}.{kind}"] // 12 == head
                    assert found[kind][block, head] == pytest.approx(100 * int(channels.sum()) / 12)


def test_channels_that_are_not_those_of_heads_are_refused(vit):
    shapes = _shapes(vit())
    selection = Selection.from_scores({n: torch.rand(s) + 1 for n, s in shapes.items()}, 0.1, 100)
    with pytest.raises(ValueError, match="24 channels, which do not split into 5 heads"):
        shares_by_head(selection, 5)


def test_the_most_sensitive_have_the_highest_drf_of_means(vit):
    shapes = _shapes(vit())
    generator = torch.Generator().manual_seed(3)
    f, shifted = (
        {name: torch.rand(s, generator=generator) ** 8 for name, s in shapes.items()}
        for _ in range(2)
    )
    units = Units("neuron", shapes)
    means = {
        (group, i): (float(value), float(units.mean(shifted)[group][i]))
        for group, values in units.mean(f).items()
        for i, value in enumerate(values)
    }
    mean = sum(value for value, _ in means.values()) / len(means)
    drf = {
        key: value + 0.4 * mean * abs(value - other) / (min(value, other) + 0.01 * mean)
        for key, (value, other) in means.items()
    }
    average = sum(drf.values()) / len(drf)
    found = most_sensitive(FisherEstimate(f, shifted, 0.4, 7), count=6)
    best = sorted(drf, key=drf.__getitem__, reverse=True)[:6]
    assert [(neuron.group, neuron.index) for neuron in found] == best
    assert [n.score for n in found] == pytest.approx([drf[key] / average for key in best], rel=1e-4)
    ratios = {
        k: value + 0.4 * abs(value - o) / (min(value, o) + 0.1) for k, (value, o) in means.items()
    }
    first = max(ratios, key=ratios.__getitem__)
    (found,) = most_sensitive(FisherEstimate(f, shifted, 0.4, 7), count=1, form="eq7", eps=0.1)
    assert (found.group, found.index) == first != best[0]


def _assert_is_the_picture(path, figure: Figure, dpi: int) -> None:
    picture = Image.open(path)
    assert picture.size == tuple(int(side * dpi) for side in figure.get_size_inches())
    assert np.asarray(picture).std() > 0  # not blank


def test_draws_heads_beside_the_feed_forward_networks(vit, tmp_path, drawn):
    units = Units("neuron", _shapes(vit()))
    scores = {group: torch.ones(each.count) for group, each in units.groups.items()}
    scores["blocks.1.K"][:12] = 2.0
    scores["blocks.0.FFN"][:48] = 3.0  # half
    selection = Selection.from_scores(scores, (12 * 25 + 48 * 49) / 10_000, 10_000, units)
    draw_heads(selection, HEADS, tmp_path / "heads.png")
    (figure,) = drawn
    _assert_is_the_picture(tmp_path / "heads.png", figure, 150)
    q, k, v, ffn, bar = figure.axes
    assert [p.get_title() for p in (q, k, v)] == ["heads of Q", "heads of K", "heads of V"]
    np.testing.assert_array_equal(k.images[0].get_array(), [[0, 0], [100, 0]])
    assert not q.images[0].get_array().any()
    # The bias of fc2, of 24 weights, is in no neuron.
    widths = [patch.get_width() for patch in ffn.patches]
    assert widths == pytest.approx([100 * 48 * 49 / (96 * 49 + 24), 0])
    assert bar.get_ylabel() == "% of the head"


def test_draws_a_row_for_each_neuron(vit, streets, tmp_path, drawn, one_thread):
    model, neurons = _Segmentor(vit()), _neurons()[:3]
    draw_neurons(model, neurons, streets, tmp_path / "neurons.png")
    (figure,) = drawn
    _assert_is_the_picture(tmp_path / "neurons.png", figure, 100)
    day, dusk = neuron_activations(model, neurons, list(streets.values()))
    panels = np.array(figure.axes).reshape(4, 3)
    assert [panel.get_title() for panel in panels[0, :2]] == ["day", "dusk"]
    title = "block 1, FFN neuron 3: DRF 1 times the mean"
    assert panels[1, 0].get_title(loc="left") == title
    for i, row in enumerate(panels[1:]):
        over = [panel.images[1] for panel in row[:2]]
        assert over[0].get_clim() == over[1].get_clim()
        for image, values in zip(over, (day[i], dusk[i]), strict=True):
            np.testing.assert_array_equal(image.get_array(), values.cpu())
            assert tuple(image.get_extent()) == (-0.5, 31.5, 31.5, -0.5)
        assert row[1].get_xlim() == (-0.5, 27.5)  # without the padding
        assert row[1].get_ylim() == (29.5, -0.5)
