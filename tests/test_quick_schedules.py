"""Each config in configs/quick_schedules trains, and its scores are the expected ones."""

import sys
from pathlib import Path
from subprocess import CompletedProcess

import pytest
from forked import run_forked

from fishertune_d2.config import CONFIGS, read_config
from fishertune_d2.streets import dataset

NAMES = ("freeze", "full", "fishertune")
FOLDER = CONFIGS / "quick_schedules"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """The first 8 scenes that `python -m fishertune_d2.streets --images 8` writes for each set."""
    root = tmp_path_factory.mktemp("data")
    counts = dict.fromkeys((("train", "day"), ("val", "day"), ("val", "dusk")), 8)
    # New processes would import for longer than they render.
    dataset.write_streets(root / "streets", progress=False, counts=counts, workers=1)
    return root


@pytest.mark.parametrize("name", NAMES)
def test_the_scores_are_the_expected_ones(name, data, tmp_path):
    def run(*options: str) -> CompletedProcess:
        words = ["--config-file", str(FOLDER / f"{name}.yaml"), *options, "OUTPUT_DIR", "out"]
        return run_forked("train_net.py", words, tmp_path, DETECTRON2_DATASETS=str(data))

    expected = read_config(str(FOLDER / f"{name}.yaml")).TEST.EXPECTED_RESULTS
    assert [data_set for data_set, *_ in expected] == ["streets_day_val", "streets_dusk_val"]
    training = run()
    assert training.returncode == 0, training.stdout[-3000:] + training.stderr[-3000:]

    # The comparison can fail: the same model is too far from a score beyond the tolerance.
    off = [[data_set, key, score + 2.01 * far, far] for data_set, key, score, far in expected]
    scoring = run("--eval-only", "--resume", "TEST.EXPECTED_RESULTS", str(off))
    assert scoring.returncode == 1 and "Result verification failed!" in scoring.stdout


def test_every_quick_schedule_is_tested():
    assert {path.stem for path in FOLDER.iterdir()} == {"Base-quick", *NAMES}


def test_the_command_in_their_heads_writes_8_scenes_for_each_set(monkeypatch, tmp_path):
    written = []
    monkeypatch.setattr(dataset, "write_streets", lambda root, counts: written.append(counts))
    monkeypatch.setattr(sys, "argv", ["streets", "--output", str(tmp_path), "--images", "8"])
    dataset.main()
    assert written == [dict.fromkeys(dataset.COUNTS, 8)]
