"""One folder, one run: a second one is refused, or the first one's files go first."""

import json
from pathlib import Path

import pytest

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.output_dir import (
    files_of_run,
    remove_run,
    require_own_weights,
    require_resumable,
    require_unused,
    require_writable,
)
from fishertune_d2.engine.trained_model import build_trained

from .conftest import train


def test_a_second_run_in_one_folder_is_refused_and_overwritten_on_demand(tiny_cfg):
    cfg = tiny_cfg(TEST__PICTURES=1)
    out = Path(cfg.OUTPUT_DIR)
    train(cfg)
    written = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    other = tiny_cfg(TUNING__METHOD="freeze", SOLVER__MAX_ITER=4)
    with pytest.raises(FileExistsError, match="holds another run .*--resume.*another.*--overwrite"):
        train(other)
    kept = {name: (out / name).read_bytes() for name in written if "events" not in name}
    assert kept.items() <= written.items()

    (out / "notes.txt").write_text("mine")
    (out / "timm").mkdir()
    remove_run(out)
    assert sorted(path.name for path in out.iterdir()) == ["notes.txt", "timm"]
    train(other)
    # Nothing of the first run is mixed into the second one's files.
    names = {path.name for path in out.iterdir()}
    assert not names & {"fisher.safetensors", "selection.safetensors", "model_0000005.pth"}
    lines = [json.loads(line) for line in (out / "metrics.json").read_text().splitlines()]
    assert max(line["iteration"] for line in lines) == 4


def test_a_run_that_failed_at_its_start_does_not_stop_the_next(tiny_cfg):
    cfg = tiny_cfg()
    out = Path(cfg.OUTPUT_DIR)
    for name in ("config.yaml", "log.txt", "events.out.tfevents.1"):
        (out / name).write_text("of the first attempt")
    (out / "metrics.json").touch()
    require_unused(out)
    (out / "metrics.json").write_text("{}")
    assert files_of_run(out) == [out / "metrics.json"]
    with pytest.raises(FileExistsError, match="metrics.json"):
        require_unused(out)


def test_a_killed_run_is_resumed_in_its_folder(tiny_cfg):
    cfg = tiny_cfg()
    Path(cfg.OUTPUT_DIR, "metrics.json").write_text("{}\n")  # killed before a checkpoint
    train(cfg, resume=True)
    train(cfg, resume=True)
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").is_file()


def test_resuming_where_another_run_was_killed_early_is_refused(tiny_cfg):
    cfg = tiny_cfg()
    out = Path(cfg.OUTPUT_DIR)
    (out / "config.yaml").write_text(tiny_cfg(SEED=1).dump())
    require_resumable(cfg)  # it has trained nothing
    (out / "metrics.json").write_text("{}\n")
    require_resumable(tiny_cfg(SEED=1, DATASETS__TEST=()))
    with pytest.raises(ValueError, match="SEED was 1 and is 42. Choose another OUTPUT_DIR, or st"):
        require_resumable(cfg)
    (out / "last_checkpoint").write_text("model_0000001.pth")
    require_resumable(cfg)  # the checkpoint's record says more


def test_pictures_of_an_earlier_evaluation_do_not_stay(tiny_cfg):
    cfg = tiny_cfg(TUNING__METHOD="freeze", TEST__PICTURES=3)
    train(cfg)
    pictures = Path(cfg.OUTPUT_DIR, "pictures")
    (pictures / "tiny_day_at_noon_2.png").touch()  # of another data set
    model = build_trained(cfg, cfg.OUTPUT_DIR + "/model_final.pth")
    Trainer.test(tiny_cfg(TUNING__METHOD="freeze", DATASETS__TEST=("tiny_day",)), model)
    names = sorted(path.name for path in pictures.iterdir())
    kept = [f"tiny_night_{k}.png" for k in range(3)]
    assert names == ["tiny_day_0.png", "tiny_day_at_noon_2.png", *kept]


def test_scores_of_other_weights_do_not_enter_a_runs_folder(tmp_path):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder in (run, other):
        folder.mkdir()
        (folder / "model_final.pth").touch()
    (run / "metrics.json").write_text("{}")
    require_own_weights(run, str(run / "model_final.pth"))
    require_own_weights(tmp_path / "scores", str(run / "model_final.pth"))
    with pytest.raises(FileExistsError, match="other/model_final.pth is not one of its checkpoi"):
        require_own_weights(run, str(other / "model_final.pth"))


def test_a_folder_that_cannot_be_written_is_refused_at_the_start(tiny_cfg, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="OUTPUT_DIR .*file/out cannot be written in .*choose ano"):
        require_writable(tmp_path / "file/out")
    cfg = tiny_cfg()
    cfg.OUTPUT_DIR = str(tmp_path / "file/out")
    with pytest.raises(OSError, match="cannot be written in"):
        Trainer(cfg)
    require_writable(tmp_path / "new/out")
    assert not [*(tmp_path / "new/out").iterdir()]
