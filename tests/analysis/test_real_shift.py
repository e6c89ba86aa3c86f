import json
import runpy
import sys

import numpy as np
from PIL import Image

from fishertune_d2.analysis import real_shift

LINES = {"no shift": 0.3, "real, other half": 0.6, "F alone": 0.15, "random": 0.05}
SHIFTS = {"Eq. 6, 1": 0.2, "night": 0.4, **LINES}
MEASURED = {
    "rows": [
        {
            "seed": seed,
            "unit": unit,
            "score": "DRF",
            "rho": rho,
            "x": x,
            "shift": shift,
            # The two seeds differ by 0.1, and the rows with the other x are never drawn.
            "overlap": share + rho + (seed - 43.5) / 10 if x == "same" else 1.0,
        }
        for seed in (43, 44)
        for unit in ("weight", "neuron")
        for rho in (0.01, 0.1)
        for x in ("same", "other")
        for shift, share in SHIFTS.items()
    ]
}
# A seed that only one shift has is left out.
MEASURED["rows"] += [
    row | {"seed": 45, "overlap": 0.0}
    for row in MEASURED["rows"]
    if (row["seed"], row["shift"]) == (44, "night")
]


def test_the_command_draws_beside_the_file(tmp_path, monkeypatch, capsys):
    file = tmp_path / "real_shift.json"
    file.write_text(json.dumps(MEASURED))
    monkeypatch.setattr(sys, "argv", ["real_shift", str(file)])
    runpy.run_path(real_shift.__file__, run_name="__main__")
    picture = tmp_path / "real_shift.png"
    assert capsys.readouterr().out.strip() == str(picture)
    assert np.asarray(Image.open(picture)).std() > 0  # not blank


def test_draws_simulations_as_bars_between_the_lines_of_the_others(tmp_path, drawn):
    real_shift.draw_real_shift(MEASURED, tmp_path / "real_shift.png")
    panels = drawn[0].axes
    titles = ["weights, DRF, rho 0.01", "weights, DRF, rho 0.1", "neurons, DRF, rho 0.01"]
    assert [axes.get_title() for axes in panels][:3] == titles
    for axes, rho in zip(panels, (0.01, 0.1, 0.01, 0.1), strict=True):
        heights = [bar.get_height() for bar in axes.patches]
        np.testing.assert_allclose(heights, [20 + 100 * rho, 40 + 100 * rho])
        lines = {line.get_label(): line.get_ydata()[0] for line in axes.lines}
        for name, share in LINES.items():
            np.testing.assert_allclose(lines[name], 100 * (share + rho))
