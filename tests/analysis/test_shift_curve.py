import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from fishertune_d2.analysis import shift_curve

MEASURED = {
    "images": 4,
    "seed": 1,
    "strengths": [0.0, 1.0, 2.0],
    "change": [0.0, 0.5, 1.0],
    "fisher": [1.0, 1.1, 1.3],
    "drf": [1.0, 1.4, 2.0],
    "overlap_fisher": [1.0, 0.8, 0.6],
    "overlap_change": [None, 0.2, 0.4],
    "kinds": {
        "Q": [0.1, 0.1, 0.1],
        "K": [0.2, 0.2, 0.2],
        "V": [0.3, 0.3, 0.2],
        "FFN": [0.4, 0.4, 0.5],
    },
}


@pytest.mark.parametrize("output", [None, "other.png"])
def test_the_command_draws_beside_the_file_or_where_told(output, tmp_path, monkeypatch, capsys):
    file = tmp_path / "shift.json"
    file.write_text(json.dumps(MEASURED))
    picture = tmp_path / (output or "shift.png")
    options = ["--output", str(picture)] if output else []
    monkeypatch.setattr(sys, "argv", ["shift_curve", str(file), *options])
    runpy.run_path(shift_curve.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip() == str(picture)
    assert np.asarray(Image.open(picture)).std() > 0  # not blank


def test_draws_what_was_measured(tmp_path, drawn):
    shift_curve.draw_shift_curve(MEASURED, tmp_path / "shift.png")
    values, overlaps, kinds = drawn[0].axes
    lines = {line.get_label(): line.get_ydata() for line in (*values.lines, *overlaps.lines)}
    np.testing.assert_allclose(lines["F(x')"], [1.0, 1.1, 1.3])
    np.testing.assert_allclose(lines["DRF"], [1.0, 1.4, 2.0])
    np.testing.assert_allclose(lines["with F(x) alone"], [100, 80, 60])
    np.testing.assert_allclose(lines["with dF alone"], [np.nan, 20, 40])
    assert [area.get_label() for area in kinds.collections] == ["Q", "K", "V", "FFN"]
    tops = [area.get_paths()[0].vertices[:, 1].max() for area in kinds.collections]
    np.testing.assert_allclose(tops, [10, 30, 60, 100])
