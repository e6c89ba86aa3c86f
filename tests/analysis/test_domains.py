import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.analysis import domains
from fishertune_d2.fisher import StatisticsPerturbation


def _maps(count: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scales = torch.rand(count, 1, 1, 3, generator=generator) + 0.5
    return list(torch.randn(count, 4, 5, 3, generator=generator) * scales + scales)


def test_statistics_are_means_and_deviations_over_space():
    maps = _maps(3)
    expected = [[m.numpy().mean((0, 1)), m.numpy().std((0, 1))] for m in maps]
    np.testing.assert_allclose(domains.statistics_of(maps), expected, rtol=1e-5)


def test_distance_is_in_standard_deviations_of_the_source():
    source = domains.statistics_of(_maps(8))
    shift = np.array([[1.0, 2.0, 0.0], [0.5, 0.0, 3.0]])
    target = source + np.where([[1], [1]], shift, 0) * source.std(axis=0)
    np.testing.assert_allclose(domains.distance(source, target), shift, atol=1e-6)


def test_eq_6_moves_images_by_its_eps_in_this_unit():
    maps = _maps(6)
    batch = torch.stack(maps).flatten(1, 2)  # (6, 20, 3)
    point = torch.nn.Identity()
    perturb = StatisticsPerturbation([point], num_prefix_tokens=0, strength=1.0)
    with perturb.drawing(torch.Generator().manual_seed(1)):
        shifted = point(batch)
    moved = domains.statistics_of([image[None] for image in shifted])
    before = domains.statistics_of(maps)
    # e^-(|eps_mu| + |eps_sigma|) of each image, from how far its statistics went.
    found = np.abs(moved - before) / before.std(axis=0)
    np.testing.assert_allclose(
        np.exp(-found.mean(axis=2).sum(axis=1)), perturb.weights(), rtol=1e-3
    )


def test_a_source_without_spread_has_no_unit():
    one = domains.statistics_of(_maps(1))
    with pytest.raises(ValueError, match="the 1 images of the source do not differ"):
        domains.distance(one, one)


def test_draws_each_domain_and_the_simulated_shift(tmp_path, drawn):
    distances = {"dusk": {"pixels": 0.5, "block 4": 1.0}, "night": {"pixels": 2.0, "block 4": 3.0}}
    domains.draw_distances(distances, tmp_path / "d.png", source="day")
    (axes,) = drawn[0].axes
    assert [list(line.get_ydata()) for line in axes.lines[:2]] == [[0.5, 1.0], [2.0, 3.0]]
    # The mean of |N(0, 1)|, here by quadrature.
    x = np.linspace(-9, 9, 100_001)
    mean = (np.abs(x) * np.exp(-(x**2) / 2)).sum() * (x[1] - x[0]) / np.sqrt(2 * np.pi)
    assert axes.lines[2].get_ydata()[0] == pytest.approx(mean, rel=1e-6)
    assert np.asarray(Image.open(tmp_path / "d.png")).std() > 0
