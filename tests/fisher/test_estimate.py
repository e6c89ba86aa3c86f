"""What every estimator promises."""

from functools import partial

import pytest
import torch
from torch import nn

from fishertune_d2.fisher import (
    ESTIMATORS,
    Candidate,
    FisherEstimate,
    SoftmaxLikelihood,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
    image_seeds,
    seeded,
)


@pytest.fixture(params=sorted(ESTIMATORS))
def estimator(request) -> str:
    return request.param


def _perturbation(model: nn.Module, **options) -> StatisticsPerturbation:
    points = [model.patch_embed, model.blocks[0]]
    return StatisticsPerturbation(points, num_prefix_tokens=[0, 1], **options)


def _batches(images):
    pictures = images(6)
    return [pictures[:3], pictures[3:]]


def test_dF_is_exactly_zero_with_the_shift_switched_off(estimator, vit, images, loss):
    model = vit()

    def noisy_loss(model, batch):  # draws random numbers, as Mask2Former's loss does
        return loss(model, batch) * torch.rand(())

    estimate = estimate_fisher(
        model, _batches(images), noisy_loss, find_candidates(model), estimator=estimator,
        perturb=_perturbation(model, strength=0.0),
    )  # fmt: skip
    assert estimate.shift_weight == 1.0
    for name, f in estimate.items():
        assert torch.equal(f, estimate.shifted[name])


def test_the_shift_changes_F_and_repeats_with_its_seed(estimator, vit, images, loss):
    model = vit()
    state, before = torch.get_rng_state(), {n: p.clone() for n, p in model.named_parameters()}
    make = partial(
        estimate_fisher, model, _batches(images), loss, find_candidates(model),
        estimator=estimator, perturb=_perturbation(model),
    )  # fmt: skip
    first, second, other = make(seed=3), make(seed=3), make(seed=4)
    name = "blocks.0.mlp.fc1.weight"
    for part in ("f", "shifted"):
        assert torch.equal(getattr(first, part)[name], getattr(second, part)[name])
    assert not torch.equal(first.shifted[name], other.shifted[name])
    assert not torch.equal(first[name], first.shifted[name])
    assert 0.0 < first.shift_weight < 1.0
    assert first.notes["estimator"] == estimator
    # Nothing of the model, and no random state, was touched.
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[n], p) for n, p in model.named_parameters())


def test_what_it_measures_has_the_shape_of_the_parameters(estimator, vit, images, loss):
    model = vit()
    candidates = [c for c in find_candidates(model) if c.kind != "K"]
    estimate = estimate_fisher(model, _batches(images), loss, candidates, estimator=estimator)
    parameters = dict(model.named_parameters())
    assert set(estimate) == {c.name for c in candidates}
    for name, f in estimate.items():
        assert f.shape == parameters[name].shape
        assert f.dtype == torch.float32 and (f >= 0).all()
    assert estimate["blocks.0.attn.qkv.weight"][24:48].count_nonzero() == 0
    assert (estimate.images, estimate.shifted, estimate.shift_weight) == (6, {}, 1.0)


def test_random_numbers_belong_to_an_image_whatever_its_batch(vit, images, loss):
    model = vit(dtype=torch.float64)

    def noisy_loss(model, batch):
        factors = []
        for seed in image_seeds(len(batch)):
            with seeded(seed):
                factors.append(torch.rand((), device=batch[0][0].device))
        return loss(model, batch) * torch.stack(factors)

    make = partial(estimate_fisher, model, _batches(images), noisy_loss, find_candidates(model))
    fast, slow = (make(estimator=way) for way in ("diagonal", "diagonal_loop"))
    for name in fast:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-9, atol=1e-20)


@pytest.mark.parametrize("initialized", [False, True])
def test_random_numbers_of_gpus_are_kept_where_cuda_is_used_and_only_there(
    monkeypatch, initialized
):
    seen = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: initialized)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: None)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda gpu: seen.append(gpu) or gpu)
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda state, gpu: seen.append(state))
    with seeded(1):
        pass
    assert seen == ([0, 1, 0, 1] if initialized else [])


def test_sampled_labels_are_the_models(vit, images):
    model = vit(dtype=torch.float64)
    nn.init.constant_(model.head.bias, 0.0)
    model.head.bias.data[2] = 50.0  # certain of class 2: its own labels cost nothing
    likelihood = SoftmaxLikelihood(
        lambda model, batch: model(torch.stack([image for image, _ in batch]).double()),
        lambda batch: torch.tensor([label for _, label in batch]),
    )
    make = partial(estimate_fisher, model, _batches(images), likelihood, find_candidates(model))
    true, empirical = make(labels="sampled"), make()
    name = "blocks.1.mlp.fc2.weight"
    assert true[name].max() < 1e-20 < empirical[name].max()


def test_bfloat16_is_near_and_an_autocast_outside_does_not_leak(vit, images, loss):
    model = vit()
    make = partial(estimate_fisher, model, _batches(images), loss, find_candidates(model))
    exact, half = make(), make(autocast=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.float16):
        outside = make()
    for name in exact:
        assert torch.equal(outside[name], exact[name])
    name = "blocks.0.mlp.fc1.weight"
    assert half[name].dtype == torch.float32
    error = (half[name] - exact[name]).norm() / exact[name].norm()
    assert 0 < error < 0.1  # bfloat16 has 8 bits


def test_the_scale_of_a_grad_scaler_does_not_leak(vit, images, loss):
    model = vit()
    make = partial(estimate_fisher, model, _batches(images), loss, find_candidates(model))
    before = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss(model, images(2)).mean()).backward()  # as in the middle of AMP training
    during = make()
    assert all(torch.equal(before[name], during[name]) for name in before)


def test_file_round_trip(tmp_path):
    f, shifted = ({name: torch.rand(2, 3) for name in ("b", "a.b")} for _ in range(2))
    estimate = FisherEstimate(f, shifted, 0.3, 7, {"seed": "5"})
    estimate.save(tmp_path / "fisher.safetensors")
    loaded = FisherEstimate.load(tmp_path / "fisher.safetensors")
    assert list(loaded) == list(loaded.shifted) == ["b", "a.b"]  # ties are broken by the order
    assert torch.equal(loaded["a.b"], estimate["a.b"])
    assert torch.equal(loaded.shifted["a.b"], estimate.shifted["a.b"])
    assert (loaded.shift_weight, loaded.images, loaded.notes) == (0.3, 7, {"seed": "5"})


def test_refuses(vit, images, loss):
    model = vit()
    candidates = find_candidates(model)
    make = partial(estimate_fisher, model, _batches(images), loss, candidates)
    with pytest.raises(ValueError, match="no batch to estimate"):
        estimate_fisher(model, [], loss, candidates)
    with pytest.raises(ValueError, match="no candidate to estimate"):
        estimate_fisher(model, [], loss, [])
    with pytest.raises(ValueError, match="unknown estimator 'laplace': choose from"):
        make(estimator="laplace")
    with pytest.raises(ValueError, match="unknown labels 'mine': choose from"):
        make(labels="mine")
    with pytest.raises(ValueError, match="labels='sampled' needs a loss_fn with a method sampled"):
        make(labels="sampled")
    with pytest.raises(ValueError, match="got torch.float16; squares of gradients underflow"):
        make(autocast=torch.float16)
    with pytest.raises(ValueError, match=r"one loss per image, shape \(3,\): it returned \(\)"):
        estimate_fisher(model, _batches(images), lambda m, b: loss(m, b).mean(), candidates)


def test_a_loss_that_is_not_finite_names_the_image_and_its_file(estimator):
    model = nn.Linear(2, 1)
    candidates = [Candidate("weight", "FFN", 0, model.weight, slice(0, 1), 2)]
    batch = [
        {"x": torch.ones(2), "file_name": "a.png"},
        {"x": torch.full((2,), torch.inf), "file_name": "b.png"},
    ]

    def loss(model, batch):
        return model(torch.stack([item["x"] for item in batch])).square().squeeze(1)

    with pytest.raises(FloatingPointError, match=r"loss is not finite on image 1 of .* \(b.png\)"):
        estimate_fisher(model, [batch], loss, candidates, estimator=estimator)


def test_an_overflowing_square_is_named():
    model = nn.Linear(1, 1)
    candidates = [Candidate("weight", "FFN", 0, model.weight, slice(0, 1), 1)]
    batch = torch.full((1, 1), 1e30)
    with pytest.raises(FloatingPointError, match="information of weight overflows torch.float32"):
        estimate_fisher(model, [batch], lambda m, x: m(x).squeeze(1), candidates)


def test_images_do_not_meet_in_batch_norms_and_their_statistics_stay():
    torch.manual_seed(0)
    linear, norm = nn.Linear(3, 4), nn.BatchNorm1d(4)
    model = nn.Sequential(linear, norm)
    candidates = [Candidate("0.weight", "FFN", 0, linear.weight, slice(0, 4), 12)]

    def loss(model, batch):
        return model(batch).square().sum(1)

    batch, buffers = torch.randn(5, 3), [buffer.clone() for buffer in model.buffers()]
    estimate = estimate_fisher(model, [batch], loss, candidates)
    assert norm.training
    assert all(map(torch.equal, model.buffers(), buffers))
    # As initialised, in eval mode: y / sqrt(1 + eps), so dL/dw = 2 y x / (1 + eps).
    gradients = 2 * linear(batch)[:, :, None] * batch[:, None] / (1 + norm.eps)
    torch.testing.assert_close(estimate["0.weight"], gradients.square().mean(0))
