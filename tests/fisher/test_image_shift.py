"""F(x') from shifted images equals F of images that were shifted before."""

from functools import partial

import numpy as np
import pytest
import scipy.integrate
import torch
from scipy.stats import norm

from fishertune_d2.fisher import ImageShift, estimate_fisher, find_candidates
from fishertune_d2.fisher.batch_losses import mixed_seed
from fishertune_d2.fisher.image_shift import MEAN_WEIGHT

SEED = 5


def darker(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Another darkness for each image, and less of the first channel."""
    return (image * rng.uniform(0.2, 0.6) * np.array([0.5, 1, 1])).astype(np.uint8)


@pytest.fixture
def batches() -> list[list[dict]]:
    """Two batches of three images as the mapper gives them."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (6, 3, 32, 32), generator=generator, dtype=torch.uint8)
    items = [{"image": image, "label": i % 2} for i, image in enumerate(pixels)]
    return [items[:3], items[3:]]


@pytest.fixture
def measure(vit, loss):
    """Estimates F with the loss of a tiny ViT on images in [0, 1]."""
    model = vit()

    def of_items(model, batch):
        return loss(model, [(item["image"] / 255, item["label"]) for item in batch])

    return partial(
        estimate_fisher, model, loss_fn=of_items, candidates=find_candidates(model), seed=SEED
    )


@pytest.mark.parametrize("estimator", ["diagonal", "diagonal_loop"])
@pytest.mark.parametrize("bgr", [False, True])
def test_the_shifted_images_are_measured(measure, batches, estimator, bgr):
    shift = ImageShift(darker, "darker", bgr)
    estimate = measure(batches, perturb=shift, estimator=estimator)

    def by_hand(item, seed, image):
        channels = [2, 1, 0] if bgr else [0, 1, 2]
        pixels = item["image"][channels].permute(1, 2, 0).numpy()
        changed = darker(pixels, np.random.default_rng(mixed_seed(seed, image)))
        return {**item, "image": torch.from_numpy(changed).permute(2, 0, 1)[channels]}

    shifted = [
        [by_hand(item, mixed_seed(SEED, step), i) for i, item in enumerate(batch)]
        for step, batch in enumerate(batches)
    ]
    expected = measure(shifted, estimator=estimator)
    for name, f in expected.items():
        torch.testing.assert_close(estimate.shifted[name], f, rtol=1e-4, atol=1e-12)
    assert estimate.shift_weight == pytest.approx(MEAN_WEIGHT)
    assert estimate.notes["shift"] == "darker" and "strength" not in estimate.notes


def test_the_loop_passes_single_images_alone(measure, batches):
    sizes = []

    def loss(model, batch):
        sizes.append(len(batch))
        return measure.keywords["loss_fn"](model, batch)

    shift = ImageShift(darker, "darker")
    measure(batches, loss_fn=loss, perturb=shift, estimator="diagonal_loop")
    assert sizes == [1] * 12  # six images and their shifts


def test_a_shift_that_changes_nothing_gives_the_same_F(measure, batches):
    before = [[item["image"].clone() for item in batch] for batch in batches]
    estimate = measure(batches, perturb=ImageShift(lambda image, rng: image, "none"))
    for name, f in estimate.items():
        assert torch.equal(f, estimate.shifted[name])
    after = [[item["image"] for item in batch] for batch in batches]
    assert all(torch.equal(a, b) for x, y in zip(before, after, strict=True)
               for a, b in zip(x, y, strict=True))  # fmt: skip


def test_its_weight_is_the_mean_of_eq_7():
    mean, _ = scipy.integrate.quad(lambda a: np.exp(-abs(a)) * norm.pdf(a), -np.inf, np.inf)
    assert pytest.approx(mean**2, rel=1e-6) == MEAN_WEIGHT
