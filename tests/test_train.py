"""What the train command refuses before any process starts, in this process."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

from fishertune_d2 import train
from fishertune_d2.config import default_config, read_config

CONFIG = "camvid/freeze.yaml"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Returns a function that runs the command up to its start, and gives its last error."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    started = []
    monkeypatch.setattr(train, "launch", lambda *args, **kwargs: started.append(args))

    def run(*arguments: str) -> str:
        words = ["train_net.py", "--config-file", CONFIG, *arguments]
        monkeypatch.setattr(sys, "argv", [word for word in words if word])
        started.clear()
        try:
            train.run()
        except SystemExit as end:
            assert end.code, "a refusal has an exit code"
            assert not started
            return capsys.readouterr().err
        assert started
        return ""

    return run


@pytest.fixture
def used(tmp_path) -> Path:
    """The folder of a run, with files that a new run could start from."""
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("metrics.json", "model_warmup.pth", "model_final.pth", "fisher.safetensors"):
        (folder / name).write_text("{}")
    (folder / "config.yaml").write_text(default_config().dump())
    return folder


def _options(folder: Path) -> list[str]:
    return ["OUTPUT_DIR", str(folder)]


@pytest.mark.parametrize(
    ("key", "file"),
    [
        ("TUNING.WARMUP_CHECKPOINT", "model_warmup.pth"),
        ("MODEL.WEIGHTS", "model_final.pth"),
        ("FISHER.ESTIMATE", "fisher.safetensors"),
    ],
)
def test_overwriting_spares_what_the_new_run_starts_from(command, used, key, file):
    error = command("--overwrite", *_options(used), key, str(used / file))
    assert f"would delete {used / file}, from which {key} starts the new run" in error
    assert (used / file).is_file() and (used / "metrics.json").is_file()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["DATASETS.TRAIN", "('camvid_dya_train',)"], "Did you mean 'camvid_day_train'"),
        (["MODEL.WEIGHTS", "gone.pth"], "MODEL.WEIGHTS is gone.pth, and there is no such file"),
        (["FISHER.FORM", "eq8"], "FISHER.FORM is 'eq8'"),
    ],
)
def test_a_run_that_cannot_start_deletes_nothing(command, used, options, words):
    assert words in command("--overwrite", *_options(used), *options)
    assert sorted(path.name for path in used.iterdir())[-1] == "model_warmup.pth"
    assert len([*used.iterdir()]) == 5


def test_a_used_folder_is_refused_and_a_new_one_is_taken(command, used, tmp_path):
    assert "holds another run (fisher.safetensors, " in command(*_options(used))
    assert command(*_options(tmp_path / "new/folder")) == ""
    assert "choose one" in command("--overwrite", "--resume", *_options(used))
    assert "SOLVER.BASE_LR was 0.0001 and is 0.5" in command(
        "--resume", *_options(used), "SOLVER.BASE_LR", "0.5"
    )


def test_the_config_of_a_run_says_what_its_number_of_processes_trains(command, used, monkeypatch):
    options = [*_options(used), "SOLVER.REFERENCE_WORLD_SIZE", "2"]
    cfg = read_config(CONFIG, options)
    with monkeypatch.context() as patch:
        patch.setattr(train, "_check_data", lambda cfg: None)
        for name in ("__init__", "resume_or_load", "train"):
            patch.setattr(train.Trainer, name, lambda *args, **kwargs: None)
        train._train(cfg, Namespace(resume=True))
    written = read_config(str(used / "config.yaml"), [])
    assert written.SOLVER.MAX_ITER == 2 * cfg.SOLVER.MAX_ITER  # in one process
    assert command("--resume", *options) == ""


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["MODEL.DEVICE", "gpu"], "MODEL.DEVICE is 'gpu': choose cuda, cuda:1 or cpu"),
        (["SOLVER.CHECKPOINT_PERIOD", "0"], "SOLVER.CHECKPOINT_PERIOD is 0: choose at least 1"),
        (["SOLVER.KEEP_CHECKPOINTS", "-1"], "SOLVER.KEEP_CHECKPOINTS is -1: choose how many"),
        (["INPUT.FORMAT", "XYZ"], "INPUT.FORMAT is 'XYZ': choose from RGB, BGR"),
        (["INPUT.CROP.SIZE", "[0,64]"], "INPUT.CROP.SIZE is [0, 64]: give a height and a width"),
        (["INPUT.MIN_SIZE_TRAIN", "[]"], "INPUT.MIN_SIZE_TRAIN is []: give at least one"),
        (["SOLVER.LR_SCHEDULER_NAME", "No"], "LR_SCHEDULER_NAME is 'No': choose from WarmupPolyLR"),
        (
            ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "x"],
            "CLIP_TYPE is 'x': choose from full_model, norm, value",
        ),
        (["INPUT.RANDOM_FLIP", "up"], "INPUT.RANDOM_FLIP is 'up': choose from horizontal"),
        (
            ["--eval-only", "DATASETS.TEST", "()", "MODEL.WEIGHTS", "w"],
            "DATASETS.TEST names no data",
        ),
        (["--eval-only"], "MODEL.WEIGHTS is empty, so random weights would be scored"),
        (
            ["TUNING.WARMUP_CHECKPOINT", "w.pth", "MODEL.WEIGHTS", "m.pth"],
            "both say where training starts",
        ),
        (["--num-gpus", "3", "SOLVER.IMS_PER_BATCH", "4"], "A batch of 4 images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_work_is_refused_before_it_starts(command, tmp_path, arguments, words):
    error = command(*_flags_first(arguments, _options(tmp_path / "out")))
    assert words in error and "Traceback" not in error


def _flags_first(arguments: list[str], options: list[str]) -> list[str]:
    count = 2 if "--num-gpus" in arguments else int(arguments[0].startswith("--"))
    return [*arguments[:count], *options, *arguments[count:]]


def test_no_process_to_start_is_one(command, tmp_path):
    assert command("--num-gpus", "0", *_options(tmp_path / "out")) == ""


def test_an_evaluation_needs_a_folder_that_can_be_written(command, tmp_path):
    (tmp_path / "file").touch()
    error = command("--eval-only", *_options(tmp_path / "file"), "MODEL.WEIGHTS", "w.pth")
    assert f"OUTPUT_DIR {tmp_path / 'file'} cannot be written in" in error
