import pytest
import timm
import torch
from torch import nn
from torch.func import functional_call, grad

from fishertune_d2.fisher import (
    Candidate,
    FisherEstimate,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
)


def _vit() -> nn.Module:
    torch.manual_seed(0)
    vit = timm.create_model("test_vit", num_classes=3, img_size=32, dynamic_img_size=True)
    return vit.train()


def _batches(count: int, size: int = 3) -> list[list]:
    generator = torch.Generator().manual_seed(1)

    def draw():
        image = torch.randn(3, 32, 32, generator=generator)
        return image, int(torch.randint(3, (), generator=generator))

    return [[draw() for _ in range(size)] for _ in range(count)]


def _loss(model: nn.Module, batch) -> torch.Tensor:
    images = torch.stack([image for image, _ in batch])
    labels = torch.tensor([label for _, label in batch])
    return nn.functional.cross_entropy(model(images), labels, reduction="none")


def test_is_the_mean_of_squares_per_image_by_torch_func_in_float64():
    vit, batches = _vit(), _batches(2)
    candidates = find_candidates(vit)
    estimate = estimate_fisher(vit, batches, _loss, candidates)
    reference = _vit().double()
    names = {c.name for c in candidates}
    weights = {name: p.detach() for name, p in reference.named_parameters()}

    def loss(chosen, image, label):
        output = functional_call(reference, {**weights, **chosen}, (image[None],))
        return nn.functional.cross_entropy(output, torch.tensor([label]))

    images = [item for batch in batches for item in batch]
    chosen = {name: weights[name] for name in names}
    for name in names:
        squares = [grad(loss)(chosen, image.double(), label)[name] ** 2 for image, label in images]
        expected = torch.stack(squares).mean(0)
        # The key's bias cannot change a softmax: its gradient is 0 but for rounding.
        torch.testing.assert_close(estimate[name].double(), expected, rtol=1e-3, atol=1e-12)
    assert estimate.images == 6
    assert set(estimate) == names


def test_is_not_the_square_of_the_mean_gradient():
    weight = nn.Parameter(torch.ones(1))
    candidate = Candidate("w", "Q", 0, weight, slice(0, 1), 1)
    # Gradients +1 and -1: the mean gradient is 0, the mean square is 1.
    batches = [torch.tensor([1.0, -1.0])]
    estimate = estimate_fisher(
        nn.Module(), batches, lambda m, x: weight * x, [candidate], estimator="diagonal_loop"
    )
    assert estimate["w"].item() == 1.0


def test_dF_is_exactly_zero_with_the_shift_switched_off():
    vit = _vit()

    def noisy_loss(model, batch):  # draws random numbers, as Mask2Former's loss does
        return _loss(model, batch) * torch.rand(())

    points = [vit.patch_embed, vit.blocks[1]]
    off = StatisticsPerturbation(points, num_prefix_tokens=1, strength=0.0)
    estimate = estimate_fisher(vit, _batches(2), noisy_loss, find_candidates(vit), perturb=off)
    assert estimate.shift_weight == 1.0
    for name, f in estimate.items():
        assert torch.equal(f, estimate.shifted[name])


def test_the_shift_changes_F_and_repeats_with_its_seed():
    vit = _vit()
    on = StatisticsPerturbation([vit.patch_embed, vit.blocks[1]], num_prefix_tokens=1)
    state = torch.get_rng_state()
    first, second = (
        estimate_fisher(vit, _batches(2), _loss, find_candidates(vit), perturb=on, seed=3)
        for _ in range(2)
    )
    name = "blocks.0.mlp.fc1.weight"
    assert torch.equal(first.shifted[name], second.shifted[name])
    assert not torch.equal(first[name], first.shifted[name])
    assert 0.0 < first.shift_weight < 1.0
    assert torch.equal(torch.get_rng_state(), state)
    assert vit.training and all(p.grad is None for p in vit.parameters())


def test_rows_that_are_no_candidates_are_zero():
    vit = _vit()
    queries = [c for c in find_candidates(vit) if c.kind == "Q"]
    f = estimate_fisher(vit, _batches(1), _loss, queries)["blocks.0.attn.qkv.weight"]
    assert f[:64].count_nonzero() > 0
    assert f[64:].count_nonzero() == 0


def test_file_round_trip(tmp_path):
    estimate = FisherEstimate({"a.b": torch.rand(2, 3)}, {"a.b": torch.rand(2, 3)}, 0.3, 7)
    estimate.save(tmp_path / "fisher.safetensors")
    loaded = FisherEstimate.load(tmp_path / "fisher.safetensors")
    assert torch.equal(loaded["a.b"], estimate["a.b"])
    assert torch.equal(loaded.shifted["a.b"], estimate.shifted["a.b"])
    assert (loaded.shift_weight, loaded.images) == (0.3, 7)


def test_refuses():
    weight = nn.Parameter(torch.ones(1))
    candidate = Candidate("w", "Q", 0, weight, slice(0, 1), 1)
    model = nn.Module()
    with pytest.raises(ValueError, match="no batch"):
        estimate_fisher(model, [], lambda m, b: weight, [candidate])
    with pytest.raises(ValueError, match="unknown estimator 'laplace': choose from"):
        estimate_fisher(model, [], lambda m, b: weight, [candidate], estimator="laplace")
    with pytest.raises(ValueError, match="unknown labels 'mine': choose from"):
        estimate_fisher(model, [], lambda m, b: weight, [candidate], labels="mine")
