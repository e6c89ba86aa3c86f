"""The record of a run: which keys count for whom, and how it travels."""

import json
from dataclasses import replace

import pytest
import torch

from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.run_keys import Result, changes, differing_keys
from fishertune_d2.engine.run_record import RunRecord

CLASSES = ("ground", "wall", "sky")


def _record(**keys) -> RunRecord:
    return RunRecord.of_run(_cfg(**keys), ["a/1.png", "a/2.png"], CLASSES)


def _cfg(**keys):
    cfg = default_config()
    for key, value in keys.items():
        cfg.merge_from_list([key.replace("__", "."), value])
    return cfg


@pytest.mark.parametrize(
    ("key", "predictions", "warmup", "estimate"),
    [
        ("MODEL.VFM.NAME", True, True, True),
        ("MODEL.VFM.PIXELS", True, True, True),
        ("MODEL.PIXEL_MEAN", True, True, True),
        ("MODEL.MASK_FORMER.DEC_LAYERS", True, True, True),
        ("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", False, True, True),
        ("INPUT.FORMAT", True, True, True),
        ("INPUT.CROP.SIZE", False, True, True),
        ("SEED", False, True, True),
        ("SOLVER.BASE_LR", False, True, True),
        ("SOLVER.BACKBONE_MULTIPLIER", False, False, False),
        ("SOLVER.EMA_START", False, False, False),
        ("SOLVER.WEIGHT_DECAY", False, True, True),
        ("SOLVER.WEIGHT_DECAY_END", False, False, False),
        ("TUNING.METHOD", True, False, False),
        ("TUNING.LORA.RANK", True, False, False),
        ("TUNING.D_MAX", False, False, False),
        ("TUNING.WARMUP_ITERS", False, True, True),
        ("FISHER.BATCHES", False, False, True),
        ("FISHER.PERTURB.STRENGTH", False, False, True),
        ("FISHER.FORM", False, False, False),
    ],
)
def test_each_key_counts_for_what_depends_on_it(key, predictions, warmup, estimate):
    assert key in _record(TUNING__METHOD="lora").config
    results = (Result.PREDICTIONS, Result.WARMUP, Result.ESTIMATE)
    assert tuple(changes(key, result) for result in results) == (predictions, warmup, estimate)


@pytest.mark.parametrize(
    "key",
    ["OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE", "TEST.MODE", "TEST.PROTOCOL", "DATASETS.TEST"],
)
def test_places_and_the_protocol_of_the_test_are_no_part_of_a_run(key):
    assert key not in _record().config


def test_a_note_and_a_checkpoint_give_back_the_record(tmp_path):
    record = _record(DATASETS__TRAIN=("tiny_day", "tiny_night"))
    read = RunRecord.of_state(json.loads(json.dumps(record.state_dict())))
    assert not differing_keys(read.config, record.config)
    record.require_same_run(read)
    file = tmp_path / "model.pth"
    torch.save({"run": record.state_dict(), "iteration": 6}, file)
    read = RunRecord.of_checkpoint(torch.load(file, weights_only=True))
    assert (read.classes, read.images, read.iterations) == (CLASSES, 2, 7)
    assert RunRecord.of_checkpoint({"model": {}}) is None


def test_a_schedule_that_was_renamed_is_the_same_schedule():
    _record().require_same_run(_record(TUNING__SCHEDULE="text"))
    _record(TUNING__SCHEDULE="text").require_same_run(_record())
    with pytest.raises(ValueError, match="TUNING.SCHEDULE was 'text' and is 'linear'"):
        _record(TUNING__SCHEDULE="linear").require_same_run(_record(TUNING__SCHEDULE="text"))


def test_keys_that_one_side_lacks_are_not_compared():
    config = dict(_record().config)
    config["MODEL.OLD"] = 1
    del config["MODEL.VFM.PIXELS"]
    old = RunRecord(config)
    old.require_same_predictions(_cfg(MODEL__VFM__PIXELS="authors"), {"town": ["other"] * 3})
    with pytest.raises(ValueError, match=r"MODEL.VFM.PATCH_SIZE was 16 and is 14. Take the config"):
        old.require_same_predictions(_cfg(MODEL__VFM__PATCH_SIZE=14))


@pytest.mark.parametrize(
    ("classes", "trouble"),
    [
        (["Ground", "wall", "sky "], ""),
        (["sky", "wall", "ground"], "class 0 was 'ground' in training and is 'sky' in town"),
        (["ground", "wall"], "3 classes were trained and town has 2"),
    ],
)
def test_classes_in_another_order_are_refused(classes, trouble):
    record = _record()
    if not trouble:
        record.require_same_predictions(_cfg(), {"town": classes})
        return
    with pytest.raises(ValueError, match=trouble):
        record.require_same_predictions(_cfg(), {"town": classes})


def test_other_images_are_other_training_data():
    more = RunRecord.of_run(_cfg(), ["1.png", "2.png", "3.png"], CLASSES)
    with pytest.raises(ValueError, match="there were 2 training images and are 3"):
        more.require_shareable(_record(), Result.WARMUP, "TUNING.WARMUP_CHECKPOINT w.pth")
    moved = RunRecord.of_run(_cfg(), ["b/1.png", "b/2.png"], CLASSES)
    assert moved.require_shareable(_record(), Result.WARMUP, "w") == []


def test_the_length_of_training_is_allowed_to_differ_and_named():
    longer = _record(SOLVER__MAX_ITER=9, SOLVER__BACKBONE_MULTIPLIER=0.5)
    unusual = longer.require_shareable(_record(), Result.WARMUP, "w")
    assert unusual == ["SOLVER.MAX_ITER was 40000 and is 9"]
    with pytest.raises(ValueError, match=r"w is of a run with other settings: SEED was 42 and is"):
        _record(SEED=1).require_shareable(_record(), Result.WARMUP, "w")


def test_the_trainer_records_its_classes_and_images(tiny_cfg):
    trainer = Trainer(tiny_cfg())
    trainer.checkpointer.save("model_0000000", iteration=0)
    file = tiny_cfg().OUTPUT_DIR + "/model_0000000.pth"
    record = RunRecord.of_checkpoint(torch.load(file, weights_only=True))
    assert (record.classes, record.images, record.iterations) == (CLASSES, 6, 1)
    assert record.config["TUNING.METHOD"] == "fishertune"


def test_a_records_values_replace_those_of_a_config_but_for_the_precision():
    record = _record(SEED=7, SOLVER__MAX_ITER=9, DATASETS__TRAIN=("a",))
    cfg = _cfg(SOLVER__AMP__ENABLED=True, TEST__MODE="whole")
    applied = record.applied_to(cfg)
    assert (applied.SEED, applied.SOLVER.MAX_ITER, applied.DATASETS.TRAIN) == (7, 9, ("a",))
    assert applied.SOLVER.AMP.ENABLED and applied.TEST.MODE == "whole"
    assert cfg.SEED == 42


def test_a_records_values_also_replace_what_the_config_itself_would_not_read():
    record = _record(TUNING__METHOD="lora", TUNING__LORA__RANK=3)
    assert record.applied_to(_cfg()).TUNING.LORA.RANK == 3
    older = replace(record, config={**record.config, "GONE": 1, "MODEL.DEVICE": "gone"})
    assert older.applied_to(_cfg()).MODEL.DEVICE == _cfg().MODEL.DEVICE
