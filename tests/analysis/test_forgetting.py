"""Measures of forgetting against closed forms and scikit-learn."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from fishertune_d2.analysis.forgetting import (
    IGNORED,
    draw_forgetting,
    linear_cka,
    neighbour_accuracy,
    patch_classes,
    probe_accuracy,
    table_of,
)


def clusters(count: int, seed: int, spread: float = 1.5) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around three centres, with few patches of the last class."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
    classes = torch.multinomial(torch.tensor([0.6, 0.3, 0.1]), count, True, generator=generator)
    noise = torch.randn(count, 8, generator=generator)
    return centres[classes] + spread * noise, 2 * classes + 1  # ids with gaps


def test_cka_is_1_after_a_rotation_and_a_scale():
    x = torch.randn(50, 6, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(6, 6, dtype=torch.float64))[0]
    assert linear_cka(x, 3 * x @ rotation + 7) == pytest.approx(1)
    stretched = x * torch.tensor([10, 1, 1, 1, 1, 1])
    assert linear_cka(x, stretched) < 0.9


def test_cka_is_the_correlation_of_the_kernels():
    """The definition: the centred inner product of X X^T and Y Y^T."""
    x, y = torch.randn(30, 5, dtype=torch.float64), torch.randn(30, 7, dtype=torch.float64)
    centre = torch.eye(30, dtype=torch.float64) - 1 / 30
    k, m = (centre @ each @ each.T @ centre for each in (x, y))
    assert linear_cka(x, y) == pytest.approx(float((k * m).sum() / (k.norm() * m.norm())))
    assert linear_cka(y, x) == pytest.approx(linear_cka(x, y))


def test_cka_refuses_sets_that_do_not_compare():
    with pytest.raises(ValueError, match="30 patches cannot be compared with 29"):
        linear_cka(torch.rand(30, 2), torch.rand(29, 2))
    with pytest.raises(ValueError, match="same features"):
        linear_cka(torch.rand(30, 2), torch.ones(30, 2))


def test_a_patch_has_the_class_of_more_than_half_of_its_pixels():
    label = np.full((5, 8), 255, np.uint8)
    label[:4, :4] = 3
    label[:4, 4:6] = 7  # half of the second patch
    label[4, :] = 2  # a quarter of each lower patch, the rest is padding
    assert patch_classes(label, (5, 8), 4).tolist() == [[3, IGNORED], [IGNORED, IGNORED]]
    label[:3, 6] = 7
    assert patch_classes(label, (5, 8), 4)[0].tolist() == [3, 7]
    # A label of twice the size gives the same classes.
    twice = label.repeat(2, 0).repeat(2, 1)
    assert patch_classes(twice, (5, 8), 4).equal(patch_classes(label, (5, 8), 4))


def test_the_probe_is_weighted_ridge_regression():
    train, test = clusters(400, 1), clusters(300, 2)
    x, y = train[0].double().numpy(), train[1].numpy()
    weight = 1 / np.bincount(y)[y]
    centred = x - np.average(x, 0, weight)
    penalty = 1e-3 * (weight[:, None] * centred**2).sum(0).mean()
    hot = np.stack([y == c for c in (1, 3, 5)], 1).astype(float)
    ridge = Ridge(alpha=penalty).fit(x, hot, weight)
    found = np.array([1, 3, 5])[ridge.predict(test[0].double().numpy()).argmax(1)]
    expected = balanced_accuracy_score(test[1].numpy(), found)
    assert probe_accuracy(train, test) == pytest.approx(expected)
    assert 0.5 < expected < 0.95


def test_the_probe_does_not_depend_on_how_often_a_class_occurs():
    (features, classes), test = clusters(400, 1), clusters(300, 2)
    often = torch.cat([torch.arange(400), (classes == 1).nonzero()[:, 0].repeat(50)])
    expected = probe_accuracy((features, classes), test)
    assert probe_accuracy((features[often], classes[often]), test) == pytest.approx(expected)


def test_the_vote_is_scikit_learns():
    train, test = clusters(400, 3), clusters(300, 4)
    oracle = KNeighborsClassifier(20, metric="cosine", algorithm="brute")
    oracle.fit(train[0].numpy(), train[1].numpy())
    expected = balanced_accuracy_score(test[1].numpy(), oracle.predict(test[0].numpy()))
    assert neighbour_accuracy(train, test) == pytest.approx(expected, abs=0.01)  # float32 ties
    assert 0.4 < expected < 0.95


def test_features_without_a_class_are_at_chance():
    noise = clusters(600, 5, spread=1e4), clusters(600, 6, spread=1e4)
    assert probe_accuracy(*noise) == pytest.approx(1 / 3, abs=0.08)


MEASURED = {
    "models": [
        {"name": name, "cka": cka, "accuracy": {"day": {"probe": probe, "neighbours": probe / 2}}}
        for name, cka, probe in (("full", [1.0, 0.5, 0.4, 0.2], 0.7), ("freeze", [1.0] * 4, 0.62))
    ]
}


def test_the_table_has_the_middle_and_the_last_block():
    cells = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in table_of(MEASURED).split("\n")
    ]
    assert cells[0] == ["backbone", "CKA, middle", "CKA, last", "day, probe", "day, neighbours"]
    assert cells[2:] == [
        ["full", "0.500", "0.200", "70.0", "35.0"],
        ["freeze", "1.000", "1.000", "62.0", "31.0"],
    ]


def test_the_page_has_the_committed_numbers():
    results = Path(__file__).resolve().parents[2] / "docs/results"
    measured = json.loads((results / "forgetting.json").read_text())
    assert table_of(measured) in (results / "when.md").read_text()


def test_the_figure_is_written(tmp_path):
    draw_forgetting(MEASURED, tmp_path / "forgetting.png")
    assert (tmp_path / "forgetting.png").stat().st_size > 5000
