"""Drawing leaves a notebook's way of showing figures alone, and needs no display."""

import re
import subprocess
import sys
from pathlib import Path

import fishertune_d2

PACKAGE = Path(fishertune_d2.__file__).parent

# In a process of its own, as pytest imports pyplot, too. The backend is one that nobody chooses.
SCRIPT = """
import sys
from pathlib import Path
import matplotlib
matplotlib.use("svg")
import torch
from fishertune_d2.analysis import (
    compare, convergence, domains, embedding, features, forms, methods, neuron_map,
    selection_map, sensitivity_map, shift_curve, statistics
)
from fishertune_d2.fisher import FisherEstimate, Selection
import fishertune_d2.report
folder = Path(sys.argv[1])
name, shape = "blocks.0.mlp.fc1.weight", (3, 4)
scores = {name: torch.rand(shape) + 0.1}
selection_map.draw_selection_map(Selection.from_scores(scores, 0.2, 20), folder / "1.png")
estimate = FisherEstimate(scores, {name: torch.rand(shape)}, 0.3, 7)
sensitivity_map.draw_sensitivity_map([("a", estimate)], folder / "2.png")
domains.draw_distances({"night": {"pixels": 0.5}}, folder / "3.png", source="day")
methods.draw({"fishertune": {"night": [1.0, 2.0]}}, folder / "4.png")
curve = {"estimator": "x", "images": [1], "seconds": [1], "overlap": [1], "drf_overlap": [1]}
measured = {"reference": {"images": 1, "seconds_per_image": 1}, "curves": [curve]}
convergence.draw_convergence(measured, folder / "5.png")
shift = {k: [1.0, 2.0] for k in ("strengths", "fisher", "drf", "overlap_fisher", "overlap_change")}
kinds = {kind: [0.2, 0.3] for kind in shift_curve.KINDS}
shift_curve.draw_shift_curve({**shift, "kinds": kinds, "images": 1, "seed": 0}, folder / "6.png")
rows = {"blocks.0.attn.qkv.weight": torch.rand(12, 2) + 0.1, **scores}
neuron_map.draw_heads(Selection.from_scores(rows, 0.2, 20), 2, folder / "7.png")
assert len(list(folder.glob("*.png"))) == 7
assert matplotlib.get_backend().lower() == "svg", matplotlib.get_backend()
pyplot = sys.modules.get("matplotlib.pyplot")
print("figures left:", pyplot.get_fignums() if pyplot else [])
"""


def test_drawing_leaves_the_backend_alone_and_no_figure_behind(tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "figures left: []"


def test_no_module_of_the_library_chooses_a_backend_or_keeps_figures():
    """Pyplot keeps each figure, for a window of its own, until it is closed."""
    found = re.compile(r"matplotlib\.use\(|\bpyplot\b|switch_backend")
    modules = sorted(PACKAGE.rglob("*.py"))
    assert len(modules) > 100
    assert [str(path) for path in modules if found.search(path.read_text())] == []
