"""Checkpoints: written whole, read back from the newest whole one, and only by their own run."""

import logging
import os
import re
from itertools import islice
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.checkpoint import WholeCheckpointer

from .conftest import same_end, train


@pytest.fixture
def checkpointer(tmp_path) -> WholeCheckpointer:
    """Of a linear layer, with three checkpoints, whose weights are 1, 2 and 3."""
    checkpointer = WholeCheckpointer(nn.Linear(100, 100), str(tmp_path))
    for i in (1, 2, 3):
        nn.init.constant_(checkpointer.model.weight, i)
        checkpointer.save(f"model_{i}", iteration=i)
        os.utime(tmp_path / f"model_{i}.pth", ns=(i, i))
    return checkpointer


def _resumed(checkpointer: WholeCheckpointer) -> int:
    iteration = checkpointer.resume_or_load("", resume=True)["iteration"]
    assert checkpointer.model.weight.unique().tolist() == [iteration]
    return iteration


def test_the_names_are_detectron2s(checkpointer, tmp_path):
    assert (tmp_path / "last_checkpoint").read_text() == "model_3.pth"
    names = ["last_checkpoint", "model_1.pth", "model_2.pth", "model_3.pth"]
    assert sorted(file.name for file in tmp_path.iterdir()) == names
    assert _resumed(checkpointer) == 3


@pytest.mark.parametrize("damage", ["truncated", "empty", "gone", "one bit", "no zip"])
def test_a_damaged_last_one_falls_back_to_the_one_before(checkpointer, tmp_path, caplog, damage):
    last = tmp_path / "model_3.pth"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1  # in the weights; torch.load would not notice
    torch.save({"model": {}}, tmp_path / "weights.pth")  # newer, but no state of a run
    damaged = {
        "truncated": content[:-100],
        "empty": b"",
        "one bit": content,
        "no zip": b"not found" * 99,
    }
    if damage == "gone":
        last.unlink()
    else:
        last.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert _resumed(checkpointer) == 2
    assert f"{last}, is damaged or gone: resuming from the one before, {tmp_path}/model_2.pth" in (
        caplog.text
    )
    # The next save makes all well.
    checkpointer.save("model_4", iteration=2)
    assert checkpointer.get_checkpoint_file() == str(tmp_path / "model_4.pth")


def test_without_a_note_of_the_last_one_the_newest_is_taken(checkpointer, tmp_path, caplog):
    (tmp_path / "last_checkpoint").unlink()
    assert checkpointer.has_checkpoint()
    with caplog.at_level(logging.WARNING):
        assert _resumed(checkpointer) == 3
    assert "model_3.pth" in caplog.text
    for path in tmp_path.glob("*.pth"):
        path.unlink()
    assert not checkpointer.has_checkpoint()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"plain text", "it is damaged, or holds more than tensors"),
        ([1, 2], "holds no state dict|damaged"),
        ({"model": None}, "holds no state dict|damaged"),
    ],
)
def test_what_is_no_checkpoint_says_what_it_is(tmp_path, content, words):
    file = tmp_path / "m.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(ValueError, match=words) as refused:
        WholeCheckpointer(nn.Linear(1, 1)).load(str(file))
    assert str(file) in str(refused.value) and "weights_only" not in str(refused.value)


def test_weights_of_which_none_or_some_fit_are_told_apart(tmp_path, caplog):
    file = str(tmp_path / "m.pth")
    torch.save({"state_dict": {"weight": torch.ones(1, 1)}}, file)
    model = nn.Linear(1, 1)
    with caplog.at_level(logging.WARNING):
        WholeCheckpointer(model).load(file)
    assert model.weight.item() == 1 and "fill 1 of the model's 2 tensors" in caplog.text
    torch.save({"other": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="none of the weights fits the model, whose first tensor"):
        WholeCheckpointer(model).load(file)


def test_without_a_whole_one_there_is_no_resuming(checkpointer, tmp_path):
    for i in (1, 2, 3):
        os.truncate(tmp_path / f"model_{i}.pth", 1000)
    with pytest.raises(ValueError, match=r"model_3.pth, is damaged .* \(2\); .*--overwrite"):
        _resumed(checkpointer)
    with pytest.raises(ValueError, match="cannot read weights from .*model_1.pth: it is damaged"):
        WholeCheckpointer(nn.Linear(1, 1)).load(str(tmp_path / "model_1.pth"))


def test_a_full_disk_leaves_the_checkpoint_before(checkpointer, tmp_path):
    (tmp_path / "model_4.pth.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="model_4.pth could not be written") as failed:
        checkpointer.save("model_4", iteration=4)
    assert "[Errno 28] No space left on device" in str(failed.value)
    assert "MiB free" in str(failed.value)
    assert not (tmp_path / "model_4.pth").exists()
    assert _resumed(checkpointer) == 3


def test_a_run_with_a_truncated_last_checkpoint_ends_as_the_undisturbed_one(tiny_cfg, finished_run):
    parts = tiny_cfg("parts", DATASETS__TEST=())
    train(parts, stop=4)
    os.truncate(Path(parts.OUTPUT_DIR) / "model_0000003.pth", 1000)
    trainer = train(parts, resume=True)
    assert trainer.start_iter == 3  # behind the warm-up, so the estimation was made again
    assert same_end(finished_run, parts.OUTPUT_DIR)


def _checkpoints(cfg: CfgNode) -> list[str]:
    return sorted(path.name for path in Path(cfg.OUTPUT_DIR).glob("*.pth"))


def test_the_newest_periodic_checkpoints_and_the_ends_of_stages_stay(tiny_cfg, finished_run):
    cfg = tiny_cfg("parts", SOLVER__KEEP_CHECKPOINTS=2, DATASETS__TEST=())
    train(cfg, stop=5)
    assert _checkpoints(cfg) == ["model_0000003.pth", "model_0000004.pth", "model_warmup.pth"]
    # A scheduler's checkpoint, and another process that must find the files of the first.
    out = Path(cfg.OUTPUT_DIR)
    (out / "model_preempted.pth").write_bytes((out / "model_0000004.pth").read_bytes())
    os.utime(out / "model_preempted.pth", ns=(1, 1))  # the oldest
    train(cfg, stop=6, resume=True)
    kept = ["model_preempted.pth", "model_warmup.pth"]
    assert _checkpoints(cfg) == ["model_0000004.pth", "model_0000005.pth", *kept]
    train(cfg, resume=True)
    assert _checkpoints(cfg) == [
        "model_0000005.pth", "model_0000006.pth", "model_final.pth", *kept
    ]  # fmt: skip
    assert (out / "last_checkpoint").read_text() == "model_final.pth"
    assert same_end(finished_run, out)


def test_a_run_that_goes_on_below_a_damaged_checkpoint_keeps_its_own(tiny_cfg):
    cfg = tiny_cfg(SOLVER__KEEP_CHECKPOINTS=1, DATASETS__TEST=())
    train(cfg, stop=6)
    out = Path(cfg.OUTPUT_DIR)
    os.truncate(out / "model_0000005.pth", 1000)
    trainer = train(cfg, resume=True, stop=4)
    assert trainer.start_iter == 3  # behind the warm-up
    assert _checkpoints(cfg) == ["model_0000003.pth", "model_warmup.pth"]
    assert (out / "last_checkpoint").read_text() == "model_0000003.pth"


def test_all_checkpoints_stay_by_default(finished_run):
    assert len(list(finished_run.glob("model_[0-9]*.pth"))) == 7


def test_resuming_names_the_keys_that_contradict_the_checkpoint(tiny_cfg):
    train(tiny_cfg(), stop=2)
    other = tiny_cfg(
        SOLVER__MAX_ITER=9, SEED=1, TUNING__D_MAX=0.02, FISHER__PERTURB__POINTS=[0, 1],
        DATASETS__TRAIN=("tiny_night",),
    )  # fmt: skip
    with pytest.raises(ValueError, match="is of another run") as refused:
        Trainer(other).resume_or_load(resume=True)
    for trouble in (
        "DATASETS.TRAIN was ('tiny_day',) and is ('tiny_night',)",
        "FISHER.PERTURB.POINTS was [0, 1, 2, 3] and is [0, 1]",
        "SEED was 42 and is 1",
        "SOLVER.MAX_ITER was 7 and is 9",
        "TUNING.D_MAX was 0.05 and is 0.02",
    ):
        assert trouble in str(refused.value)
    assert len(re.findall("[A-Z] was ", str(refused.value))) == 5
    assert "or start a new run in another OUTPUT_DIR" in str(refused.value)


def test_where_files_are_and_what_is_written_when_may_change(tiny_cfg, finished_run):
    parts = tiny_cfg("parts", DATASETS__TEST=())
    train(parts, stop=4)
    changed = tiny_cfg(
        "parts",
        SOLVER__KEEP_CHECKPOINTS=3,
        DATALOADER__NUM_WORKERS=1,
        DATASETS__TEST=("tiny_night",),
        MODEL__WEIGHTS="elsewhere.pth",
        SOLVER__CHECKPOINT_PERIOD=5,
        TEST__CLASS_RULE="union",
        TEST__EVAL_PERIOD=6,
    )
    train(changed, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)


def test_a_checkpoint_from_before_there_were_records_resumes(tiny_cfg):
    cfg = tiny_cfg()
    train(cfg, stop=2)
    file = Path(cfg.OUTPUT_DIR) / "model_0000001.pth"
    state = torch.load(file, weights_only=True)
    del state["run"]
    torch.save(state, file)
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == 2


def test_resuming_with_other_images_says_so(tiny_cfg, tiny_data):
    train(tiny_cfg(), stop=2)
    images = tiny_data / "tiny_day" / "images"
    image, label = images / "5.png", tiny_data / "tiny_day" / "labels" / "5.png"
    try:
        for file in (image, label):
            file.rename(file.with_name("7.png"))
        with pytest.raises(ValueError, match="the 6 training images have other names, or another"):
            Trainer(tiny_cfg()).resume_or_load(resume=True)
        for file in (image, label):
            file.with_name("7.png").rename(tiny_data / f"{file.parent.name}.png")
        with pytest.raises(ValueError, match="there were 6 training images and are 5"):
            Trainer(tiny_cfg()).resume_or_load(resume=True)
    finally:
        for file in (image, label):
            (tiny_data / f"{file.parent.name}.png").rename(file)
    Trainer(tiny_cfg()).resume_or_load(resume=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_breaks_in_the_middle_of_an_epoch_costs_nothing(
    tiny_cfg, tiny_data, finished_run, workers
):
    parts = tiny_cfg("parts", DATASETS__TEST=(), DATALOADER__NUM_WORKERS=workers)
    trainer = Trainer(parts)
    epoch = [index for _, index in islice(trainer.data_loader.sampler, 6)]
    path = tiny_data / "tiny_day" / "images" / f"{epoch[-1]}.png"
    content = path.read_bytes()
    try:
        path.write_bytes(content[: len(content) // 2])
        with pytest.raises(DatasetError, match=rf"{path}: cannot be read .*again"):
            trainer.train()
    finally:
        path.write_bytes(content)
    assert train(parts, resume=True).start_iter == 2
    assert same_end(finished_run, parts.OUTPUT_DIR)
