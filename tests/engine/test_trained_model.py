"""Scoring takes a trained model whole, with the settings of its training, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.data import DatasetCatalog, MetadataCatalog

from fishertune_d2.data import register_sem_seg
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.trained_model import build_trained, find_weights
from fishertune_d2.fisher import tuned_share


@pytest.fixture
def checkpoint(tiny_cfg) -> str:
    """A checkpoint of 5 iterations, of a run with the seed 7."""
    trainer = Trainer(tiny_cfg("run", SEED=7))
    trainer.checkpointer.save("model_final", iteration=4)
    return str(Path(trainer.cfg.OUTPUT_DIR, "model_final.pth"))


def _without_record(checkpoint: str, change=lambda state: None) -> str:
    state = torch.load(checkpoint, weights_only=True)["model"]
    change(state)
    file = Path(checkpoint).with_name("weights.pth")
    torch.save({"model": state}, file)
    return str(file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL__SEM_SEG_HEAD__NUM_CLASSES", 4),
        ("MODEL__MASK_FORMER__DEC_LAYERS", 4),
        ("MODEL__MASK_FORMER__NHEADS", 2),  # the tensors' shapes are the same
        ("MODEL__VFM__IMG_SIZE", [96, 96]),
        ("MODEL__VFM__PIXELS", "authors"),
        ("MODEL__PIXEL_MEAN", [0.0, 0.0, 0.0]),
        ("INPUT__FORMAT", "BGR"),
        ("TUNING__METHOD", "full"),
    ],
)
def test_settings_that_change_predictions_are_refused(tiny_cfg, checkpoint, key, value):
    name = key.replace("__", ".")
    with pytest.raises(
        ValueError, match=rf"model_final.pth: the config does.*{name} was .* and is"
    ):
        build_trained(tiny_cfg(**{key: value}), checkpoint)


def test_the_options_of_the_method_are_its_own(tiny_cfg):
    trainer = Trainer(tiny_cfg("run", TUNING__METHOD="lora"))
    trainer.start_stage("tuning")
    trainer.checkpointer.save("model_final", iteration=4)
    file = str(Path(trainer.cfg.OUTPUT_DIR, "model_final.pth"))
    with pytest.raises(ValueError, match="TUNING.LORA.RANK was 8 and is 4"):
        build_trained(tiny_cfg(TUNING__METHOD="lora", TUNING__LORA__RANK=4), file)
    build_trained(tiny_cfg(TUNING__METHOD="lora", TUNING__REIN__RANK=4), file)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("MODEL__RETINANET__NUM_CLASSES", 3),
        ("MODEL__SEM_SEG_HEAD__NORM", "BN"),
        ("TUNING__LORA__RANK", 4),
        ("MODEL__MASK_FORMER__DICE_WEIGHT", 1.0),
    ],
)
def test_keys_that_change_nothing_are_not_refused(tiny_cfg, checkpoint, key, value):
    build_trained(tiny_cfg(**{key: value}), checkpoint)


def test_what_a_report_says_of_training_is_the_checkpoints(tiny_cfg, checkpoint):
    other = {"SEED": 1, "SOLVER__MAX_ITER": 9, "TUNING__WARMUP_ITERS": 0, "TUNING__D_MAX": 0.5}
    cfg = tiny_cfg("scored", **other, SOLVER__BASE_LR=0.5, TEST__PICTURES=0)
    Trainer.test(cfg, build_trained(cfg, checkpoint))
    results = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    facts = {"seed": 7, "iterations": 5, "warmup_iterations": 3, "method": "fishertune"}
    assert results["protocol"].items() >= facts.items()
    share = results["tuned_parameters"] / results["backbone_parameters"]
    assert share == pytest.approx(tuned_share(1 / 3, 0.01, 0.05), rel=1e-3)  # 2 of 4 iterations


def test_weights_of_the_warm_up_have_tuned_nothing(tiny_cfg, checkpoint):
    state = torch.load(checkpoint, weights_only=True)
    torch.save({**state, "iteration": 2}, checkpoint)
    cfg = tiny_cfg("scored", TEST__PICTURES=0)
    Trainer.test(cfg, build_trained(cfg, checkpoint))
    results = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    assert results["tuned_parameters"] == 0 < results["backbone_parameters"]


def test_another_training_set_decides_which_test_sets_are_unseen(tiny_cfg, checkpoint):
    cfg = tiny_cfg("scored", DATASETS__TRAIN=("tiny_night",), TEST__PICTURES=0)
    Trainer.test(cfg, build_trained(cfg, checkpoint))
    results = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    assert (list(results["source"]), list(results["targets"])) == (["tiny_day"], ["tiny_night"])


@pytest.mark.parametrize(
    ("change", "trouble"),
    [
        (
            lambda state: state.pop("sem_seg_head.class_predictor.bias"),
            r"\(1 of its tensors are left\): sem_seg_head.class_predictor.bias is not among them",
        ),
        (
            lambda state: state.update({"backbone.vit.pos_embed": torch.zeros(1, 5, 64)}),
            r"backbone.vit.pos_embed has the shape \(1, 5, 64\), in the model",
        ),
        (
            lambda state: [state.pop(name) for name in [*state] if "backbone" in name],
            "the weights do not fill the model",
        ),
    ],
)
def test_weights_that_do_not_fill_the_model_are_refused(tiny_cfg, checkpoint, change, trouble):
    weights = _without_record(checkpoint, change)
    with pytest.raises(ValueError, match=f"MODEL.WEIGHTS {weights}: .*{trouble}"):
        build_trained(tiny_cfg(), weights)


def test_weights_without_a_record_are_scored_and_say_nothing_of_their_training(
    tiny_cfg, checkpoint
):
    cfg = tiny_cfg("scored", TEST__PICTURES=0)
    model = build_trained(cfg, _without_record(checkpoint))
    assert model.trained_by is None
    Trainer.test(cfg, model)
    results = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    assert results["protocol"]["seed"] is None and results["tuned_parameters"] is None


def test_random_weights_are_not_scored(tiny_cfg, checkpoint):
    cfg = tiny_cfg("scored", TEST__PICTURES=0)
    model = Trainer.build_model(cfg)
    with pytest.raises(ValueError, match=r"as they were initialised \(94, .* sem_seg_head"):
        Trainer.test(cfg, model)
    assert not Path(cfg.OUTPUT_DIR, "results.json").exists()
    # Detectron2's own checkpointer fills a part and only warns.
    part = _without_record(checkpoint, lambda s: s.pop("sem_seg_head.class_predictor.bias"))
    DetectionCheckpointer(model).load(part)
    with pytest.raises(ValueError, match=r"initialised \(1, .* sem_seg_head.class_predictor.bias"):
        Trainer.test(cfg, model)


def test_a_data_set_of_other_classes_is_refused(tiny_cfg, tiny_data, checkpoint):
    register_sem_seg(
        "tiny_renamed",
        tiny_data / "tiny_day/images",
        tiny_data / "tiny_day/labels",
        ["sky", "wall", "ground"],
    )
    try:
        with pytest.raises(ValueError, match="class 0 was 'ground' .* is 'sky' in tiny_renamed"):
            build_trained(tiny_cfg(DATASETS__TEST=("tiny_renamed",)), checkpoint)
    finally:
        DatasetCatalog.remove("tiny_renamed")
        MetadataCatalog.remove("tiny_renamed")


def test_evaluation_finds_its_weights_or_says_how_to_name_them(tiny_cfg, checkpoint):
    run = tiny_cfg("run")
    with pytest.raises(ValueError, match=f"is empty, .* add MODEL.WEIGHTS {checkpoint}, or --res"):
        find_weights(run, resume=False)
    assert find_weights(run, resume=True) == checkpoint
    with pytest.raises(ValueError, match="add MODEL.WEIGHTS FILE, the checkpoint of a run"):
        find_weights(tiny_cfg("nothing"), resume=True)
    assert find_weights(tiny_cfg(MODEL__WEIGHTS="w.pth"), resume=False) == "w.pth"
    with pytest.raises(FileNotFoundError, match="MODEL.WEIGHTS is w.pth, and there is no such"):
        build_trained(run, "w.pth")
