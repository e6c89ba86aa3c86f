"""tools/rehearse_paper.py: its short form passes, and a step that fails is told."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fishertune_d2.data import load_datasets
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.image_files import read_label

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tools"))

import rehearse_paper  # noqa: E402
from rehearse_paper import Rehearsal, StepFailed, run_steps  # noqa: E402


def test_the_short_form_passes(tmp_path):
    output = tmp_path / "rehearsal"
    run = subprocess.run(
        [sys.executable, "tools/rehearse_paper.py", "--short", "--output", output],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split()[:2] for line in run.stdout.splitlines()]
    expected = [name for name in rehearse_paper.STEPS if name not in rehearse_paper.LONG]
    assert lines[:-1] == [["PASS", name] for name in expected]


def test_fake_data_have_the_published_sizes_and_all_classes(tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    for name in (rehearse_paper.TRAIN, *rehearse_paper.TEST):
        (dataset,) = (each for each in DATASETS if each.name == name)
        rehearse_paper.write_dataset(tmp_path, dataset, 2)
        pairs = load_datasets([name])
        assert len(pairs) == 2
        sizes = {Image.open(pair["file_name"]).size for pair in pairs}
        assert sizes == {*(dataset.published.sizes or (rehearse_paper.VARYING,))}
        classes = set()
        for pair in pairs:
            label = read_label(pair["sem_seg_file_name"], pair["label_map"])
            classes |= {*np.unique(label).tolist()}
        assert classes == {*range(19)}


@pytest.fixture
def rehearsal(tmp_path):
    return Rehearsal(tmp_path, short=True)


def test_a_step_that_fails_is_told_and_the_next_one_runs(rehearsal, monkeypatch, capsys):
    def fail(rehearsal):
        rehearsal.python("-c", "import sys; print('disk full'); sys.exit(3)")

    monkeypatch.setattr(rehearse_paper, "STEPS", {"export": fail, "report": lambda each: None})
    monkeypatch.setattr(rehearse_paper, "LONG", ())
    assert list(run_steps(rehearsal)) == [False, True]
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("FAIL  export") and "exit code 3: disk full; see " in first
    assert f"{rehearsal.folder / 'export'}.txt" in first and second.startswith("PASS  report")


def test_a_command_without_an_end_is_killed(rehearsal, monkeypatch):
    monkeypatch.setattr(rehearse_paper, "PATIENCE", 0.5)
    rehearsal.step = "export"
    with pytest.raises(StepFailed, match="no end after 0.5 s"):
        rehearsal.python("-c", "import time; time.sleep(60)")


def test_a_training_that_ends_before_it_is_killed_is_told(rehearsal, monkeypatch):
    rehearsal.step = "train"
    start = rehearsal.start
    monkeypatch.setattr(rehearsal, "start", lambda *words: start("-c", "pass"))
    with pytest.raises(StepFailed, match="it ended by itself, with code 0"):
        rehearse_paper.train_and_kill(rehearsal)


def test_a_folder_with_other_files_is_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit):
        rehearse_paper.main(["--output", str(tmp_path)])
    assert "holds other files" in capsys.readouterr().err and (tmp_path / "thesis.tex").exists()
