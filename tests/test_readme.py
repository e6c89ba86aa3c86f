"""The README: short, with the numbers and drawings that its commands write."""

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fishertune_d2.config import default_config
from fishertune_d2.data.labels import LabelSpace
from fishertune_d2.evaluation.label_pictures import draw_comparison

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import draw_effect  # noqa: E402
import draw_method  # noqa: E402
import draw_results  # noqa: E402

README = (ROOT / "README.md").read_text()
IMAGES = ROOT / "docs/images"


def test_it_is_read_in_three_minutes():
    assert len(README.splitlines()) < 120
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) == 3


def test_its_scores_are_those_of_the_committed_runs():
    found = draw_results.read()
    assert draw_results.table(found) in README, "run tools/draw_results.py and copy its table"
    assert draw_results.draw(found) == (IMAGES / "results.svg").read_text(), "run it again"


def test_its_scores_stand_in_the_table_alone():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    lines = [line for line in prose.splitlines() if not line.startswith("|")]
    assert not re.findall(r"(?<!\d)\d\d\.\d+", "\n".join(lines))


def test_the_diagram_is_the_one_that_its_command_draws():
    assert draw_method.draw() == (IMAGES / "method.svg").read_text(), "run tools/draw_method.py"
    tuning = default_config().TUNING
    assert (draw_method.D_MIN, draw_method.D_MAX) == (tuning.D_MIN, tuning.D_MAX)


def test_it_cites_the_authors_and_pages_of_the_paper():
    paper = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    (authors,) = re.findall(r"author += \{(.*)\}", README)
    names = [f"{author['family-names']}, {author['given-names']}" for author in paper["authors"]]
    assert authors.split(" and ") == names
    assert f"{{{paper['start']}--{paper['end']}}}" in README
    assert f"{{{paper['year']}}}" in README


SPACE = LabelSpace(("road", "sky"), ((128, 64, 128), (70, 130, 180)), (0, 1))


@pytest.fixture
def runs(tmp_path):
    """Two runs with pictures of five scenes; FisherTune is right in more lines from 0 to 4."""
    label = np.zeros((40, 80), np.uint8)
    label[:4] = 255
    for run in ("frozen", "tuned"):
        for domain in draw_effect.DOMAINS:
            for scene, gain in enumerate((3, 0, 4, 1, 2)):
                image = np.full((40, 80, 3), 10 * scene, np.uint8)
                prediction = np.ones_like(label)
                if run == "tuned":
                    prediction[:4] = 0  # the label does not score these lines
                    prediction[4 : 4 + gain] = 0
                path = tmp_path / run / f"pictures/streets_{domain}_val_{scene}.png"
                draw_comparison(image, label, prediction, SPACE, path)
    return tmp_path


def test_the_effect_shows_the_scene_with_the_largest_gain(runs):
    domain = draw_effect.compare_scenes(runs / "frozen", runs / "tuned", "streets_fog_val")
    assert (domain.better, domain.scenes) == (4, 5)
    image, label, before, after = domain.panels
    assert np.asarray(image).max() == 20  # scene 2, with a gain of 4 lines
    gains = [draw_effect.correct_pixels(shown, label) for shown in (before, after)]
    assert gains == [0, 4 * 80]
    draw_effect.main(
        [str(runs / "frozen"), str(runs / "tuned"), "--output", str(runs / "effect.jpg")]
    )
    with Image.open(runs / "effect.jpg") as drawn, Image.open(IMAGES / "effect.jpg") as kept:
        assert drawn.size == kept.size


def test_runs_with_other_pictures_are_refused(runs):
    (runs / "tuned/pictures/streets_fog_val_4.png").unlink()
    with pytest.raises(ValueError, match="different pictures of streets_fog_val: score both"):
        draw_effect.compare_scenes(runs / "frozen", runs / "tuned", "streets_fog_val")
