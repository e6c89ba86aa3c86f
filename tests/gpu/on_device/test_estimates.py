"""Estimates and selections on a GPU equal those on a CPU."""

import pytest
import torch

from fishertune_d2.fisher import (
    ESTIMATORS,
    FisherEstimate,
    Selection,
    SoftmaxLikelihood,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
)

DRAW = ("natural", "pathwise", "variational")  # from the device's own generator


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this file."""


@pytest.fixture
def estimate(vit, images):
    """Returns a function that estimates F of six images, on any device."""

    def make(estimator: str, device: str):
        model = vit().to(device)
        loss = SoftmaxLikelihood(
            lambda model, batch: model(torch.stack([image for image, _ in batch])),
            lambda batch: torch.tensor([label for _, label in batch]),
        )
        pictures = [(image.to(device), label) for image, label in images(6)]
        return estimate_fisher(
            model,
            [pictures[:4], pictures[4:]],
            loss,
            find_candidates(model),
            estimator=estimator,
            progress=False,
        )

    return make


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name not in DRAW])
def test_an_estimate_is_the_cpus(estimate, device, estimator):
    wanted, found = estimate(estimator, "cpu"), estimate(estimator, device)
    for name in wanted:
        assert found[name].is_cuda
        error = (found[name].cpu() - wanted[name]).norm() / wanted[name].norm()
        assert error < 2e-3, name


@pytest.mark.parametrize("estimator", DRAW)
def test_an_estimate_by_drawing_follows_its_seed(estimate, device, estimator):
    first, second = estimate(estimator, device), estimate(estimator, device)
    for name in first:
        assert first[name].is_cuda
        assert first[name].isfinite().all() and first[name].any(), name
        torch.testing.assert_close(first[name], second[name])


@pytest.fixture
def scores(vit):
    """Scores of a model's candidates, many of them equal, by name."""
    generator = torch.Generator().manual_seed(0)
    return {
        candidate.name: torch.randint(1, 50, candidate.parameter.shape, generator=generator).float()
        for candidate in find_candidates(vit())
    }


def test_a_selection_is_the_cpus_even_among_equal_scores(scores, device):
    there = {name: score.to(device) for name, score in scores.items()}
    base = sum(score.numel() for score in scores.values())
    wanted, found = (Selection.from_scores(each, 0.05, base) for each in (scores, there))
    assert sum(len(index) for index in wanted.indices.values()) == int(0.05 * base)
    for name, index in wanted.indices.items():
        assert torch.equal(found.indices[name].cpu(), index), name


def test_ranks_are_the_cpus_even_among_equal_scores(scores, device):
    def ranks(device: str) -> dict[str, torch.Tensor]:
        f = {name: score.to(device) for name, score in scores.items()}
        shifted = {name: score.flip(0) for name, score in f.items()}
        return domain_related_fisher(FisherEstimate(f, shifted, 0.5, images=1), form="rank")

    wanted, found = ranks("cpu"), ranks(device)
    for name, rank in wanted.items():
        torch.testing.assert_close(found[name].cpu(), rank, rtol=1e-6, atol=0)
