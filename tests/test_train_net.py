"""The command itself, as a user types it: training, --eval-only, missing data."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from camvid_runs import TINY, TINY_CAMVID, run_new, run_train_net, write_camvid
from forked import ROOT


@pytest.fixture
def camvid(tmp_path) -> Path:
    """A folder with a fake CamVid."""
    return write_camvid(tmp_path)


def test_trains_then_evaluates_from_the_checkpoint(camvid):
    config, out = str(ROOT / "configs/camvid/fishertune.yaml"), camvid / "out"
    options = TINY_CAMVID
    command = [sys.executable, "train_net.py", "--config-file", config]
    run = run_new(camvid, *command, *options, "OUTPUT_DIR", str(out))
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    assert "average over unseen" in run.stdout
    assert f"Map of the selected weights: {out / 'selection.png'}" in run.stdout
    trained = json.loads((out / "results.json").read_text())
    assert list(trained["targets"]) == ["camvid_dusk_dev"]

    weights = str(out / "model_final.pth")
    again = camvid / "again"
    run = run_train_net(
        camvid, config, "--eval-only", *options,
        *("MODEL.WEIGHTS", weights, "OUTPUT_DIR", str(again)),
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads((again / "results.json").read_text()) == trained

    before = (out / "config.yaml").read_text()
    other = ["SOLVER.BASE_LR", "0.5", "OUTPUT_DIR", str(out)]
    run = run_train_net(camvid, config, "--resume", *options, *other)
    assert run.returncode == 1
    assert "SOLVER.BASE_LR was 0.0003 and is 0.5" in run.stderr
    assert (out / "config.yaml").read_text() == before  # of the run that is there


def _sentence(run: subprocess.CompletedProcess) -> str:
    """The one sentence that a command ended in."""
    assert run.returncode == 1 and "Traceback" not in run.stderr, run.stderr[-2000:]
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("error: ")]
    return line


def test_a_used_folder_is_refused_or_overwritten_and_random_weights_are_not_scored(camvid):
    out = camvid / "out"
    config, options = "camvid/freeze.yaml", [*TINY_CAMVID, "OUTPUT_DIR", str(out)]
    first = run_train_net(camvid, config, *options, "SEED", "1")
    assert first.returncode == 0, first.stderr[-2000:]
    scores = (out / "results.json").read_text()

    for more in ([], ["--num-gpus", "2"]):
        again = _sentence(run_train_net(camvid, config, *more, *options))
        assert "holds another run" in again and "--resume" in again and "--overwrite" in again
    both = _sentence(run_train_net(camvid, config, "--resume", "--overwrite", *options))
    assert "choose one" in both
    # The folder's config would do, but the command names no weights.
    unnamed = _sentence(run_train_net(camvid, config, "--eval-only", *options))
    assert f"add MODEL.WEIGHTS {out / 'model_final.pth'}, or --resume" in unnamed
    scored = ["OUTPUT_DIR", str(camvid / "scored"), "MODEL.WEIGHTS", str(out / "model_final.pth")]
    other = run_train_net(
        camvid, config, "--eval-only", *TINY_CAMVID, *scored, "INPUT.FORMAT", "BGR"
    )
    assert "INPUT.FORMAT was 'RGB' and is 'BGR'" in _sentence(other)
    assert (out / "results.json").read_text() == scores

    anew = run_train_net(camvid, config, "--overwrite", *options, "SEED", "2")
    assert anew.returncode == 0, anew.stderr[-2000:]
    assert json.loads((out / "results.json").read_text())["protocol"]["seed"] == 2


def test_what_stops_one_of_two_processes_is_said_in_a_sentence(tmp_path):
    out = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path / "out")]
    processes = ["--num-gpus", "2", "--dist-url", "auto"]  # the default port may be taken
    run = run_train_net(tmp_path, "camvid/freeze.yaml", *processes, *TINY, *out)
    assert "set DETECTRON2_DATASETS" in run.stderr
    assert run.returncode == 1 and "Traceback" not in run.stderr


def test_missing_data_end_in_the_expected_tree(tmp_path):
    out = str(tmp_path / "out")
    config = "fishertune_dinov2.yaml"
    run = run_train_net(tmp_path, config, "MODEL.DEVICE", "cpu", "OUTPUT_DIR", out)
    assert run.returncode == 1
    assert "15.21 M of 304.20 M backbone weights will be tuned" in run.stdout
    for folder in ("gta/images", "cityscapes/gtFine/val", "bdd100k/images/10k/val", "mapillary"):
        assert folder in run.stderr
    assert "set DETECTRON2_DATASETS" in run.stderr
    assert "Traceback" not in run.stderr


def _without_detectron2(code: str) -> subprocess.CompletedProcess:
    code = f"import sys; sys.modules['detectron2'] = None\n{code}"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_without_detectron2_the_import_says_how_to_get_it_and_pure_pytorch_works():
    run = _without_detectron2(
        """
from fishertune_d2.fisher import estimate_fisher
for room, name in (
    ("fishertune_d2", "apply_fishertune"),
    ("fishertune_d2", "engine"),
    ("fishertune_d2.tuning", "build_tuning_method"),
):
    try:
        exec(f"from {room} import {name}")
    except ImportError as error:
        print(error)
"""
    )
    assert run.returncode == 0, run.stderr
    said = run.stdout.splitlines()
    assert len(said) == 3
    for line in said:
        assert line.startswith("FisherTune needs Detectron2, which is not installed: run")
        assert "tools/install_detectron2.py" in line


@pytest.mark.parametrize("command", [["train_net.py"], ["demo.py"], ["-m", "fishertune_d2.train"]])
def test_without_detectron2_a_command_ends_in_one_sentence(command, tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['detectron2'] = None")
    run = run_new(tmp_path, sys.executable, *command, PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert run.returncode == 1
    assert run.stderr.startswith("error: FisherTune needs Detectron2, which is not installed: run")
    assert len(run.stderr.splitlines()) == 1
