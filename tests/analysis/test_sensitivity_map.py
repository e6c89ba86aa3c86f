import runpy
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.analysis import sensitivity_map
from fishertune_d2.fisher import FisherEstimate

QKV, FC1 = "vit.blocks.0.attn.qkv.weight", "vit.blocks.1.mlp.fc1.weight"


def _estimate(**options) -> FisherEstimate:
    f = {QKV: torch.ones(6, 2), FC1: torch.full((4, 3), 3.0), "vit.norm.weight": torch.ones(9)}
    f[QKV][:2] = 6.0  # Q
    shifted = {name: 2 * value for name, value in f.items()}
    notes = {"estimator": "diagonal", "labels": "sampled"}
    return FisherEstimate(**{"f": f, "shifted": shifted, **options}, notes=notes)


def _run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["sensitivity_map", *map(str, arguments)])
    runpy.run_path(sensitivity_map.__file__, run_name="__main__")


def test_mean_by_group():
    estimate = _estimate(shift_weight=0.5, images=2)
    # Q 4 x 6, K 4 x 1, V 4 x 1, FFN 12 x 3; the norm is no candidate.
    average = (4 * 6 + 4 * 1 + 4 * 1 + 12 * 3) / 24
    expected = np.full((4, 2), np.nan)
    expected[:3, 0] = np.array([6, 1, 1]) / average
    expected[3, 1] = 3 / average
    np.testing.assert_allclose(sensitivity_map.mean_by_group(estimate.f), expected)


def test_a_group_is_the_mean_of_its_weights_not_of_its_parameters():
    scores = {FC1: torch.full((4, 3), 1.0), FC1.replace("weight", "bias"): torch.full((4,), 9.0)}
    scores["vit.blocks.0.mlp.fc2.weight"] = torch.full((4, 4), 2.0)
    group, average = (12 * 1 + 4 * 9) / 16, (12 * 1 + 4 * 9 + 16 * 2) / 32
    means = sensitivity_map.mean_by_group(scores)
    np.testing.assert_allclose(means[3], [2 / average, group / average])


def test_refuses_what_has_no_mean():
    with pytest.raises(ValueError, match="scores above 0"):
        sensitivity_map.mean_by_group({QKV: torch.zeros(6, 2)})
    with pytest.raises(ValueError, match="scores above 0"):
        sensitivity_map.mean_by_group({"vit.norm.weight": torch.ones(6)})


def test_refuses_an_estimate_without_shift(tmp_path):
    estimate = _estimate(shifted={}, shift_weight=1.0, images=2)
    with pytest.raises(ValueError, match=r"some run has no F\(x'\)"):
        sensitivity_map.draw_sensitivity_map([("some run", estimate)], tmp_path / "map.png")


def test_the_command_draws_two_panels_for_each_run(tmp_path, monkeypatch, capsys):
    heights = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        _estimate(shift_weight=0.5, images=2).save(tmp_path / name / "fisher.safetensors")
    for folders in (["a"], ["a", "b"]):
        _run(monkeypatch, *(tmp_path / name for name in folders))
        picture = tmp_path / "a/sensitivity.png"
        assert capsys.readouterr().out.strip() == str(picture)
        pixels = np.asarray(Image.open(picture))
        assert pixels.std() > 0  # not blank
        heights.append(pixels.shape[0])
    assert heights[1] > 1.8 * heights[0]


def test_the_command_draws_the_drf_that_the_run_selected_by(tmp_path, monkeypatch):
    estimate = _estimate(shift_weight=0.5, images=2)
    estimate.shifted[FC1] *= 4
    estimate.save(tmp_path / "fisher.safetensors")
    (tmp_path / "config.yaml").write_text("FISHER: {FORM: eq15, GAMMA: 0.5, TAU: 2.0}")
    _run(monkeypatch, tmp_path)
    options = {"form": "eq15", "gamma": 0.5, "tau": 2.0}
    for name, score in (("expected", options), ("default", {"form": "eq15"})):
        one = (tmp_path.name, estimate)
        sensitivity_map.draw_sensitivity_map([one], tmp_path / f"{name}.png", [score])
    drawn = (tmp_path / "sensitivity.png").read_bytes()
    assert drawn == (tmp_path / "expected.png").read_bytes()
    assert drawn != (tmp_path / "default.png").read_bytes()


def test_the_command_names_a_folder_without_estimate(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        _run(monkeypatch, tmp_path)
    assert f"no fisher.safetensors in {tmp_path}" in capsys.readouterr().err


def test_a_group_of_zeros_is_drawn(tmp_path):
    estimate = _estimate(shift_weight=0.5, images=2)
    estimate.f[FC1].zero_()
    estimate.shifted[FC1].zero_()
    sensitivity_map.draw_sensitivity_map([("zeros", estimate)], tmp_path / "map.png")
    assert np.asarray(Image.open(tmp_path / "map.png")).std() > 0
