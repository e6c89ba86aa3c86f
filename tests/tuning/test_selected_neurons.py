"""The gradients of selected units: their cost, and their precision under autocast."""

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from fishertune_d2.fisher import Selection, Units, find_candidates
from fishertune_d2.tuning import SelectedWeights


def _select(model: nn.Module, unit: str, every: int) -> Selection:
    """Selects every ``every``-th unit of each group."""
    model.requires_grad_(False)
    shapes = {c.name: tuple(c.parameter.shape) for c in find_candidates(model)}
    units = Units(unit, shapes)
    zeros = units.mean({name: torch.zeros(shape) for name, shape in shapes.items()})
    scores = {
        name: (torch.arange(zero.numel()) % every == 0).float().view(zero.shape)
        for name, zero in zeros.items()
    }
    weights = sum(int(score.sum()) * units.groups[name].size for name, score in scores.items())
    return Selection.from_scores(scores, 1.0, weights, units)


def _pixels(images) -> Tensor:
    return torch.stack([image for image, _ in images(4)])


def _loss(model: nn.Module, pixels: Tensor) -> Tensor:
    return model(pixels).float().logsumexp(dim=1).sum()


def _backward_flops_and_saved_bytes(model: nn.Module, pixels: Tensor) -> tuple[int, int]:
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = _loss(model, pixels)
    with FlopCounterMode(display=False) as counted:
        loss.backward()
    return counted.get_total_flops(), sum(kept.values())


def test_neurons_cost_their_part_of_the_gradient(vit, images):
    costs = {}
    for unit in ("none", "weight", "neuron"):
        model = vit()
        selected = SelectedWeights(model, _select(model, unit.replace("none", "weight"), 8))
        if unit == "none":  # the patch embedding gets a gradient, so that the inputs all need one
            selected.release()
            model.requires_grad_(False)
            model.cls_token.requires_grad_(True)
        else:
            selected.grow(1.0)
        costs[unit] = _backward_flops_and_saved_bytes(model, _pixels(images))
    (floor, _), (dense, dense_saved), (part, part_saved) = costs.values()
    # One slice in eight of every candidate; the first block's inputs need no gradient.
    assert part < floor + (dense - floor) / 5
    assert part_saved < dense_saved


def test_float16_autocast_gives_the_gradients_of_a_dense_mask(vit, images):
    sparse, dense = (vit("separate q, k, v and SwiGLU") for _ in range(2))
    selection = _select(sparse, "neuron", 8)
    selected = SelectedWeights(sparse, selection)
    selected.grow(1.0)
    for name in _select(dense, "neuron", 8).shapes:
        dense.get_parameter(name).requires_grad_(True)
    for model in (sparse, dense):
        with torch.autocast("cpu", torch.float16):
            loss = _loss(model, _pixels(images))
        (8 * loss).backward()  # as a gradient scaler does
    for name, values in selected.parameters().items():
        expected = dense.get_parameter(name).grad.view(-1)[selection.prefix(name, 1.0)]
        assert values.grad.dtype == torch.float32
        torch.testing.assert_close(values.grad, expected, rtol=2e-3, atol=2e-3)


def _require_dense_gradients(sparse: nn.Module, dense: nn.Module, pixels: Tensor) -> None:
    """Compares the gradients of selected neurons with those of all weights."""
    selection = _select(sparse, "neuron", 8)
    selected = SelectedWeights(sparse, selection)
    selected.grow(1.0)
    dense.requires_grad_(True)
    for model in (sparse, dense):
        _loss(model, pixels).backward()
    for name, values in selected.parameters().items():
        expected = dense.get_parameter(name).grad.view(-1)[selection.prefix(name, 1.0)]
        torch.testing.assert_close(values.grad, expected, msg=name)


def test_an_activation_may_overwrite_a_layers_output(vit, images):
    models = vit(), vit()
    for model in models:
        for block in model.blocks:
            block.mlp.act = nn.ReLU(inplace=True)
    _require_dense_gradients(*models, _pixels(images))


def _double(layer: nn.Linear) -> None:
    """Gives a layer a forward pass of its own, as libraries do that wrap layers."""
    plain = layer.forward
    layer.forward = lambda x: 2 * plain(x)


def test_a_layers_own_forward_pass_is_kept(vit, images):
    models = vit(), vit()
    for model in models:
        _double(model.blocks[1].mlp.fc1)
    _require_dense_gradients(*models, _pixels(images))


def test_release_keeps_a_layers_own_forward_pass(vit, images):
    model, pixels = vit(), _pixels(images)
    _double(model.blocks[1].mlp.fc1)
    expected = model(pixels)
    selected = SelectedWeights(model, _select(model, "neuron", 8))
    selected.release()
    assert torch.equal(model(pixels), expected)


def test_bfloat16_autocast(vit, images, select):
    model = vit()
    model.requires_grad_(False)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    selected = SelectedWeights(model, select(model))
    selected.grow(0.05)
    optimizer = torch.optim.AdamW(list(selected.parameters().values()), lr=1e-2, weight_decay=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        model(_pixels(images)).float().logsumexp(dim=1).sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in selected.parameters().values())
    optimizer.step()
    masks = selected.selection.masks(0.05)
    for name, value in model.state_dict().items():
        mask = masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], start[name][~mask])
