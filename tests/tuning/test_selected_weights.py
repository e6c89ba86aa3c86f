"""Selected entries as parameters, against a dense mask on a stock optimizer."""

import copy
import gc
import weakref
from collections.abc import Callable

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fishertune_d2.fisher import Selection
from fishertune_d2.tuning import MaskedUpdate, SelectedWeights
from fishertune_d2.tuning.selected_values import SelectedValues


def _freeze(model: nn.Module) -> dict[str, Tensor]:
    """Freezes all parameters; returns what they hold."""
    model.requires_grad_(False)
    return {name: value.clone() for name, value in model.state_dict().items()}


def _pixels(images, count: int = 4) -> Tensor:
    return torch.stack([image for image, _ in images(count)])


def _adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters), lr=1e-2, weight_decay=0.5)


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, pixels: Tensor) -> None:
    optimizer.zero_grad()
    model(pixels).logsumexp(dim=1).sum().backward()
    held = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(held, 0.1)
    optimizer.step()


def _trained(
    model: nn.Module, pixels: Tensor, select: Callable
) -> tuple[nn.Module, SelectedWeights]:
    """The model after a step, with the weights that it took the step by."""
    _freeze(model)
    selected = SelectedWeights(model, select(model))
    selected.grow(0.05)
    _step(model, _adamw(selected.parameters().values()), pixels)
    return model, selected


def test_trains_as_a_dense_mask_does(vit, family, images, select):
    # In float64, or Adam blows up roundings where a gradient is next to nothing.
    sparse, dense = vit(family, torch.float64), vit(family, torch.float64)
    start, _ = _freeze(sparse), _freeze(dense)
    selection, pixels = select(sparse), _pixels(images).double()
    selected = SelectedWeights(sparse, selection)
    held = {name: dense.get_parameter(name).requires_grad_(True) for name in selection.shapes}
    optimizers = _adamw(selected.parameters().values()), _adamw(held.values())
    masked = MaskedUpdate(optimizers[1], held, selection)
    # The dense gradients are masked when the optimizer steps, so clip what a mask leaves of them.
    for name, parameter in held.items():
        parameter.register_hook(lambda grad, name=name: grad * masked.masks[name])
    for step in range(50):
        share = 0.01 + 0.04 * step / 49
        assert selected.grow(share) == masked.grow(share) == selection.weights(share)
        for model, optimizer in zip((sparse, dense), optimizers, strict=True):
            _step(model, optimizer, pixels)
    masks = selection.masks(0.05)
    expected = dense.state_dict()
    for name, value in sparse.state_dict().items():
        torch.testing.assert_close(value, expected[name])
        mask = masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], start[name][~mask]), name
    moved = sum(int((sparse.state_dict()[n] != start[n]).sum()) for n in masks)
    assert moved > 0.9 * selection.weights(0.05)  # a bias of K has no gradient but rounding


def test_the_optimizer_holds_the_selected_alone(vit, images, select):
    model = vit()
    _freeze(model)
    selection = select(model)
    selected = SelectedWeights(model, selection)
    trainable = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trainable) == selection.weights(0.05)
    assert {id(p) for p in trainable} == {id(p) for p in selected.parameters().values()}
    selected.grow(0.05)
    optimizer = _adamw(trainable)
    _step(model, optimizer, _pixels(images))
    moments = [s["exp_avg"].numel() + s["exp_avg_sq"].numel() for s in optimizer.state.values()]
    assert sum(moments) == 2 * selection.weights(0.05)
    # No dense gradient is left anywhere.
    grads = [p.grad.numel() for p in model.parameters() if p.grad is not None]
    assert sum(grads) == selection.weights(0.05)


def test_what_has_nothing_selected_costs_no_gradient(vit, images, select):
    model = vit()
    _freeze(model)
    selected = SelectedWeights(model, select(model, 0.02, only=lambda name: "blocks.1.mlp" in name))
    assert {name[:13] for name in selected.parameters()} == {"blocks.1.mlp."}
    selected.grow(0.02)
    seen = []
    for module in (model.blocks[0], model.blocks[1].attn):
        module.register_forward_hook(lambda *args: seen.append(args[-1].requires_grad))
    output = model(_pixels(images))
    assert output.requires_grad
    assert seen == [False, False]  # the backward pass ends in the block that holds the selection


def test_an_entry_that_joins_later_starts_from_where_it_was(vit, images, select):
    model = vit()
    start = _freeze(model)
    selection = select(model)
    selected = SelectedWeights(model, selection)
    optimizer = _adamw(selected.parameters().values())
    selected.grow(0.01)
    for _ in range(3):
        _step(model, optimizer, _pixels(images))
    first, later = selection.masks(0.01), selection.masks(0.05)
    for name, value in model.state_dict().items():
        if name in first:
            assert torch.equal(value[~first[name]], start[name][~first[name]])
    selected.grow(0.05)
    for name, value in model.state_dict().items():
        if name in first:
            joining = later[name] & ~first[name]
            assert torch.equal(value[joining], start[name][joining])
    assert selected.grow(0.02) == selection.weights(0.05)  # never shrinks


def test_state_dict_is_the_plain_models_in_both_directions(vit, images, select):
    plain = vit()
    model, _ = _trained(vit(), _pixels(images), select)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    plain.load_state_dict(trained)  # strict
    pixels = _pixels(images)
    assert torch.equal(plain(pixels), model(pixels))

    other = {name: value + 1 for name, value in plain.state_dict().items()}
    model.load_state_dict(other)
    model(pixels)  # writes the values into the weights
    assert all(torch.equal(value, other[name]) for name, value in model.state_dict().items())
    # Inside a larger model, names have a prefix.
    whole = nn.ModuleDict({"backbone": model})
    assert set(whole.state_dict()) == {f"backbone.{name}" for name in other}
    whole.load_state_dict({f"backbone.{name}": value for name, value in trained.items()})
    assert torch.equal(plain(pixels), model(pixels))


def test_a_copy_of_the_model_is_on_its_own(vit, images, select):
    model = vit()
    _freeze(model)
    selected = SelectedWeights(model, select(model))
    selected.grow(0.05)
    average = copy.deepcopy(model)
    before = {name: value.clone() for name, value in average.state_dict().items()}
    _step(model, _adamw(selected.parameters().values()), _pixels(images))
    assert all(torch.equal(v, before[name]) for name, v in average.state_dict().items())
    name = "blocks.0.mlp.fc1.weight"
    assert not torch.equal(model.state_dict()[name], before[name])


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_the_weights_are_written_when_the_optimizer_has_stepped(
    vit, images, way, monkeypatch, select
):
    model = vit()
    start = _freeze(model)
    selected = SelectedWeights(model, select(model))
    selected.grow(0.03)
    optimizer = torch.optim.AdamW(list(selected.parameters().values()), lr=1e-2, **way)
    _step(model, optimizer, _pixels(images))
    writes = _count_writes(monkeypatch)
    name = "blocks.1.mlp.fc1.weight"
    dense = model.get_submodule("blocks.1.mlp.fc1").parametrizations.weight.original
    mask = selected.selection.masks(0.03)[name]
    assert torch.equal((dense != start[name]).cpu(), mask)
    with torch.no_grad():
        model(_pixels(images))
    model.state_dict()
    assert writes == []  # nothing has moved since
    _step(model, optimizer, _pixels(images))
    assert len(writes) == 1


def _count_writes(monkeypatch) -> list[SelectedValues]:
    writes, write = [], SelectedValues.write
    monkeypatch.setattr(
        SelectedValues, "write", lambda values: (writes.append(values), write(values))
    )
    return writes


def test_an_optimizer_that_calls_its_parents_step_writes_once(vit, images, monkeypatch, select):
    class Clipping(torch.optim.AdamW):
        def step(self, closure=None):
            return super().step(closure)

    model = vit()
    _freeze(model)
    selected = SelectedWeights(model, select(model))
    selected.grow(0.05)
    optimizer = Clipping(list(selected.parameters().values()), fused=True)
    other = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    writes = _count_writes(monkeypatch)
    _step(model, optimizer, _pixels(images))
    other.step()
    assert len(writes) == 1


def test_a_backward_pass_through_weights_that_have_moved_since_fails(vit, images, select):
    model = vit()
    _freeze(model)
    selected = SelectedWeights(model, select(model))
    selected.grow(0.03)
    optimizer = _adamw(selected.parameters().values())
    late = model(_pixels(images)).sum()
    _step(model, optimizer, _pixels(images))
    with pytest.raises(RuntimeError, match="inplace"):
        late.backward()


def test_values_that_no_optimizer_has_moved_are_written_when_they_are_read(vit, select):
    model = vit()
    _freeze(model)
    selected = SelectedWeights(model, select(model))
    selected.grow(0.05)
    with torch.no_grad():
        for values in selected.parameters().values():
            values.add_(1)
    for name, values in selected.parameters().items():
        path, _, attribute = name.rpartition(".")
        weight = getattr(model.get_submodule(path), attribute)
        places = selected.selection.prefix(name, 0.05)
        assert torch.equal(weight.view(-1)[places], values)


def test_what_joins_after_a_checkpoint_was_loaded_starts_from_that(vit, images, select):
    model = vit()
    _freeze(model)
    selected = SelectedWeights(model, select(model))
    optimizer = _adamw(selected.parameters().values())
    selected.grow(0.01)
    _step(model, optimizer, _pixels(images))
    loaded = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(loaded)
    _step(model, optimizer, _pixels(images))
    selected.grow(0.05)
    first, later = (selected.selection.masks(share) for share in (0.01, 0.05))
    for name, values in selected.parameters().items():
        places = selected.selection.prefix(name, 0.05)
        joining = (later[name] & ~first[name]).view(-1)[places]
        assert torch.equal(values[joining], loaded[name].view(-1)[places][joining])


@pytest.mark.parametrize("parted", [copy.deepcopy, lambda model: model.double()])
def test_a_copied_or_converted_model_grows_and_trains_on(vit, images, parted, select):
    model = vit()
    _freeze(model)
    selection = select(model)
    selected = SelectedWeights(model, selection)
    selected.grow(0.01)
    model = parted(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    values = [p for p in model.parameters() if p.requires_grad]
    entries = [m for m in model.modules() if hasattr(m, "shared")]
    optimizer, shared = _adamw(values), entries[0].shared
    dtype = next(model.parameters()).dtype
    for share in (0.01, 0.03, 0.05):
        assert shared.grow(selection.count(share)) == selection.weights(share)
        _step(model, optimizer, _pixels(images).to(dtype))
        model(_pixels(images).to(dtype))  # a copy's optimizer has no hook: reading writes
    masks = selection.masks(0.05)
    for name, value in model.state_dict().items():
        mask = masks.get(name, torch.zeros(value.shape, dtype=torch.bool))
        assert torch.equal(value[~mask], start[name][~mask])
    assert {id(e.shared) for e in entries} == {id(shared)}
    assert all(v.untyped_storage()._cdata == shared.flat.untyped_storage()._cdata for v in values)


def test_the_optimizers_hooks_keep_no_model_alive(vit, select):
    model = vit()
    selected = SelectedWeights(model, select(model))
    alive = weakref.ref(model)
    del model, selected
    gc.collect()
    assert alive() is None


def test_release_leaves_the_plain_model(vit, images, select):
    plain = vit()
    model, selected = _trained(vit(), _pixels(images), select)
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    selected.release()
    assert [name for name, _ in model.named_parameters()] == [
        name for name, _ in plain.named_parameters()
    ]
    assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())


def test_gradients_accumulate_to_those_of_the_large_batch(vit, images, select):
    pixels = _pixels(images, 4)
    grads = []
    for parts in ([pixels], pixels.split(2)):
        model = vit(dtype=torch.float64)
        _freeze(model)
        selected = SelectedWeights(model, select(model))
        selected.grow(0.05)
        for part in parts:
            model(part.double()).logsumexp(dim=1).sum().backward()
        grads.append({name: p.grad for name, p in selected.parameters().items()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_two_forward_passes_before_their_backward_passes_share_no_gradient(vit, images, select):
    pixels = _pixels(images, 4).double()
    grads = []
    for together in (False, True):
        model = vit(dtype=torch.float64)
        _freeze(model)
        selected = SelectedWeights(model, select(model))
        selected.grow(0.03)
        values = list(selected.parameters().values())
        losses = [model(part).logsumexp(dim=1).sum() for part in pixels.split(2)]
        if together:
            grads.append(torch.autograd.grad(sum(losses), values))
        else:
            each = [torch.autograd.grad(loss, values) for loss in losses]
            grads.append([a + b for a, b in zip(*each, strict=True)])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other)


def test_activation_checkpoints_change_no_gradient(vit, images, select):
    grads = []
    for recompute in (False, True):
        model = vit()
        _freeze(model)
        if recompute:
            for block in model.blocks:
                forward = block.forward
                block.forward = lambda x, f=forward, **_: checkpoint(f, x, use_reentrant=False)
        selected = SelectedWeights(model, select(model))
        selected.grow(0.05)
        model(_pixels(images)).logsumexp(dim=1).sum().backward()
        grads.append({name: p.grad for name, p in selected.parameters().items()})
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_a_compiled_model_trains_the_same(select):
    trained = []
    for compile_ in (lambda model: model, lambda model: torch.compile(model, backend="aot_eager")):
        torch.manual_seed(0)
        model = _Block()  # small: it compiles
        model.requires_grad_(False)
        selected = SelectedWeights(model, select(model, 0.3))
        optimizer = _adamw(selected.parameters().values())
        compiled, inputs = compile_(model), torch.randn(4, 8)
        for share in (0.1, 0.2, 0.3):
            selected.grow(share)
            _step(compiled, optimizer, inputs)
        trained.append(model.state_dict())
    for name, value in trained[0].items():
        torch.testing.assert_close(trained[1][name], value)


class _Block(nn.Module):
    """A feed-forward network with timm's names."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mlp": timm.layers.Mlp(8, 16, 4)})])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0]["mlp"](x)


def test_refuses_a_selection_of_another_model(vit, tmp_path, select):
    selection = select(vit("packed SwiGLU"))
    with pytest.raises(ValueError, match="made for another model: .*the first is blocks.0.mlp.fc2"):
        SelectedWeights(vit(), selection)
    selection.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="/other.safetensors was made for another model"):
        SelectedWeights(vit(), Selection.load(tmp_path / "other.safetensors"))


def test_refuses_a_weight_that_two_layers_share(vit, select):
    model = vit()
    model.blocks.append(model.blocks[1])  # a block that runs twice is no trouble
    SelectedWeights(model, select(model)).release()
    first, second = (block.mlp.fc1 for block in model.blocks[:2])
    second.weight = first.weight
    told = "blocks.0.mlp.fc1.weight is also blocks.1.mlp.fc1.weight"
    with pytest.raises(ValueError, match=told):
        SelectedWeights(model, select(model))


def test_steps_of_units_are_scaled(vit, images, select):
    pixels, moved = _pixels(images).double(), []
    for scaled in (False, True):
        model = vit(dtype=torch.float64)
        start = _freeze(model)
        selection = select(model)
        generator = torch.Generator().manual_seed(5)
        steps = {
            name: torch.rand(group.count, generator=generator, dtype=torch.float64)
            for name, group in selection.units.groups.items()
        }
        if scaled:
            selection.steps = {name: steps[name][i] for name, i in selection.indices.items()}
        selected = SelectedWeights(model, selection)
        selected.grow(0.03)
        _step(model, _adamw(selected.parameters().values()), pixels)
        moved.append({n: (value - start[n]).cpu() for n, value in model.state_dict().items()})
    shaped = {name: steps[name].view(selection.shapes.get(name, (-1,))) for name in steps}
    factors, masks = selection.units.spread(shaped), selection.masks(0.03)
    for name, plain in moved[0].items():
        expected = plain * factors[name] * masks[name] if name in masks else plain
        torch.testing.assert_close(moved[1][name], expected, rtol=1e-6, atol=1e-12)


def test_only_the_step_is_scaled_and_no_other_change(vit, images, select):
    model = vit()
    _freeze(model)
    selection = select(model)
    selection.steps = {n: torch.full(index.shape, 0.5) for n, index in selection.indices.items()}
    selected = SelectedWeights(model, selection)
    selected.grow(0.05)
    values = list(selected.parameters().values())
    optimizer = torch.optim.SGD(values, lr=0.1)
    model(_pixels(images)).logsumexp(dim=1).sum().backward()
    start = [each.detach().clone() for each in values]
    with torch.no_grad():
        for each in values:
            each.add_(1)
    optimizer.step()
    for before, each in zip(start, values, strict=True):
        torch.testing.assert_close(each.detach(), before + 1 - 0.5 * 0.1 * each.grad)
