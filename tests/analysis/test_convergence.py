import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from fishertune_d2.analysis import convergence


def _curve(estimator, seconds, overlap, drf_overlap):
    curve = {"estimator": estimator, "images": [8, 16], "seconds": seconds}
    return curve | {"overlap": overlap, "drf_overlap": drf_overlap}


MEASURED = {
    "reference": {"images": 64, "seconds_per_image": 0.5},
    "curves": [
        _curve("diagonal", [1.0, 2.0], [0.5, 0.75], [0.4, 0.6]),
        _curve("natural", [3.0, 6.0], [0.25, 0.5], [0.2, 0.3]),
    ],
    "halves": {},
}


@pytest.mark.parametrize("output", [None, "other.png"])
def test_the_command_draws_beside_the_file_or_where_told(output, tmp_path, monkeypatch, capsys):
    file = tmp_path / "convergence.json"
    file.write_text(json.dumps(MEASURED))
    picture = tmp_path / (output or "convergence.png")
    options = ["--output", str(picture)] if output else []
    monkeypatch.setattr(sys, "argv", ["convergence", str(file), *options])
    runpy.run_path(convergence.__file__, run_name="__main__")
    assert capsys.readouterr().out.strip() == str(picture)
    assert np.asarray(Image.open(picture)).std() > 0  # not blank


def test_draws_overlap_against_images_and_time(tmp_path, drawn):
    convergence.draw_convergence(MEASURED, tmp_path / "convergence.png")
    curves = [
        [(line.get_label(), *map(list, line.get_data())) for line in panel.lines]
        for panel in drawn[0].axes
    ]
    # The plain loop takes 0.5 s for an image, so 1 s is the time of 2 images.
    assert curves == [
        [("diagonal", [8, 16], [50, 75]), ("natural", [8, 16], [25, 50])],
        [("diagonal", [2, 4], [50, 75]), ("natural", [6, 12], [25, 50])],
        [("diagonal", [8, 16], [40, 60]), ("natural", [8, 16], [20, 30])],
        [("diagonal", [2, 4], [40, 60]), ("natural", [6, 12], [20, 30])],
    ]


def test_as_many_curves_as_there_are(tmp_path):
    curves = [_curve(f"number {i}", [1, 2], [0.1, 0.2], [0.1, 0.2]) for i in range(12)]
    picture = tmp_path / "many.png"
    convergence.draw_convergence({**MEASURED, "curves": curves}, picture)
    assert picture.is_file()
