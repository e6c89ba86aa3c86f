import numpy as np
import torch
from matplotlib.axes import Axes
from PIL import Image

from fishertune_d2.analysis.selection_map import draw_run, draw_selection_map, shares_by_group
from fishertune_d2.fisher import Selection, Units


def _selection() -> Selection:
    scores = {
        "vit.blocks.0.attn.qkv.weight": torch.zeros(6, 2),
        "vit.blocks.1.mlp.fc1.weight": torch.zeros(4, 2),
    }
    scores["vit.blocks.0.attn.qkv.weight"][2, 0] = 1.0  # a row of K
    scores["vit.blocks.1.mlp.fc1.weight"][:2] = 2.0
    return Selection.from_scores(scores, 0.5, 10)


def test_shares_by_group():
    expected = np.full((4, 2), np.nan)
    expected[:3, 0] = [0.0, 100 / 4, 0.0]
    expected[3, 1] = 100 * 4 / 8
    np.testing.assert_allclose(shares_by_group(_selection()), expected)


def test_the_title_counts_the_weights_of_neurons(tmp_path, monkeypatch):
    titles: list[str] = []
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **_: titles.append(text))
    units = Units("neuron", {"blocks.0.mlp.fc1.weight": (4, 3), "blocks.0.mlp.fc2.weight": (3, 4)})
    selection = Selection.from_scores({"blocks.0.FFN": torch.ones(4)}, 0.5, 24, units)
    draw_selection_map(selection, tmp_path / "selection.png")
    assert titles == ["12 of 24 weights tuned (50.0 %)"]


def test_draws_beside_the_file(tmp_path):
    assert draw_run(tmp_path) is None
    _selection().save(tmp_path / "selection.safetensors")
    picture = draw_run(tmp_path)
    assert picture == tmp_path / "selection.png"
    assert np.asarray(Image.open(picture)).std() > 0  # not blank
