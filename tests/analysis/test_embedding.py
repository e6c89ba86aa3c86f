import sys

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.neighbors import KNeighborsClassifier

from fishertune_d2.analysis import embedding


def _features(gap: float, count: int = 12) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    means = gap * rng.standard_normal((3, 8))
    return {
        name: mean + rng.standard_normal((count, 8))
        for name, mean in zip(("day", "dusk", "night"), means, strict=True)
    }


def test_an_image_is_the_mean_of_its_patches():
    maps = [torch.arange(12.0).reshape(2, 3, 2), torch.ones(1, 4, 2)]
    np.testing.assert_allclose(embedding.mean_features(maps), [[5, 6], [1, 1]])


@pytest.mark.parametrize("gap", [0.0, 0.7, 20.0])
def test_purity_is_that_of_scikit_learns_nearest_neighbour(gap):
    features = _features(gap)
    values, domains = np.concatenate([*features.values()]), np.repeat(range(3), 12)
    hits = 0
    for i in range(len(values)):
        others = np.arange(len(values)) != i
        nearest = KNeighborsClassifier(1, metric="cosine").fit(values[others], domains[others])
        hits += nearest.predict(values[i : i + 1])[0] == domains[i]
    assert embedding.domain_purity(features) == pytest.approx(hits / len(values))
    if gap == 20.0:
        assert hits == len(values)


def test_purity_needs_another_image():
    with pytest.raises(ValueError, match="1 images"):
        embedding.domain_purity({"day": np.ones((1, 2))})


def test_far_groups_stay_groups_and_the_seed_decides():
    features = _features(20.0)
    points = embedding.embed(features)
    assert {name: p.shape for name, p in points.items()} == dict.fromkeys(features, (12, 2))
    within = max(np.linalg.norm(p - p.mean(0), axis=1).max() for p in points.values())
    centres = [p.mean(0) for p in points.values()]
    between = min(np.linalg.norm(centres[i] - centres[j]) for i, j in [(0, 1), (0, 2), (1, 2)])
    assert within < between
    for name, again in embedding.embed(features).items():
        np.testing.assert_array_equal(again, points[name])


def test_without_scikit_learn_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    with pytest.raises(ImportError, match="notebooks"):
        embedding.embed(_features(1.0))


def test_draws_a_panel_for_each_model(tmp_path, drawn):
    panels = {"freeze": _features(20.0), "full": _features(0.0)}
    embedding.draw_embeddings(panels, tmp_path / "t.png")
    first, second = drawn[0].axes
    assert first.get_title() == "freeze: nearest image of the same domain 100 %"
    assert second.get_title().startswith("full:")
    assert [len(points.get_offsets()) for points in first.collections] == [12, 12, 12]
    assert np.asarray(Image.open(tmp_path / "t.png")).std() > 0
