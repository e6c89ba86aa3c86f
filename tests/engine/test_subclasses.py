"""A subclass of the trainer replaces its parts as one of Detectron2's DefaultTrainer does."""

import json
import logging
from pathlib import Path

import pytest
import torch
from detectron2.data import build_detection_train_loader
from detectron2.evaluation import DatasetEvaluator

from fishertune_d2.data import SegmentationMapper, load_datasets
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.engine import Trainer
from fishertune_d2.evaluation import DomainGeneralizationEvaluator
from fishertune_d2.run import Run

# A training that only has to come to its test.
SHORT = {"TUNING__METHOD": "freeze", "TUNING__WARMUP_ITERS": 1, "SOLVER__MAX_ITER": 1}


class _Counting(DatasetEvaluator):
    """Counts images, and gives no mIoU."""

    def __init__(self, name: str):
        self.name = name

    def reset(self) -> None:
        self.images = 0

    def process(self, inputs: list, outputs: list) -> None:
        assert outputs[0]["sem_seg"].shape[0] == 3
        self.images += len(inputs)

    def evaluate(self) -> dict:
        return {self.name: {"images": self.images}}


def _train(trainer: Trainer) -> dict:
    """Trains, and returns what the test at the end returned."""
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer._last_eval_results  # Detectron2's name


def test_results_are_compared_with_the_expected_ones(tiny_cfg):
    cfg = tiny_cfg(**SHORT)
    scores = {name: m["mIoU"] for name, m in _train(Trainer(cfg)).items()}
    assert list(scores) == ["tiny_day", "tiny_night", "unseen"]
    expected = [[name, "mIoU", score, 1e-4] for name, score in scores.items()]
    _train(Trainer(tiny_cfg("again", **SHORT, TEST__EXPECTED_RESULTS=expected)))
    expected[0][2] += 1.0
    with pytest.raises(SystemExit):
        _train(Trainer(tiny_cfg("off", **SHORT, TEST__EXPECTED_RESULTS=expected)))


def test_an_evaluator_of_ones_own_is_called_for_each_test_set(tiny_cfg):
    class Mine(Trainer):
        folders = []

        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            cls.folders.append(output_folder)
            return _Counting(dataset_name)

    cfg = tiny_cfg(**SHORT)
    results = _train(Mine(cfg))
    assert results == {n: {n: {"images": 6}} for n in ("tiny_day", "tiny_night")}
    assert not Path(cfg.OUTPUT_DIR, "results.json").exists()  # no mIoU, so no table
    assert Mine.folders == [None, None]


def test_evaluators_may_be_passed_as_to_detectron2s_test(tiny_cfg):
    cfg = tiny_cfg(**SHORT, DATASETS__TEST=())
    trainer = Trainer(cfg)
    _train(trainer)
    cfg = tiny_cfg(TUNING__METHOD="freeze")
    evaluators = [_Counting(name) for name in cfg.DATASETS.TEST]
    results = Trainer.test(cfg, trainer.segmentor, evaluators)
    assert results["tiny_night"] == {"tiny_night": {"images": 6}}
    with pytest.raises(ValueError, match="1 evaluators are given for 2 test sets"):
        Trainer.test(cfg, trainer.segmentor, evaluators[:1])


def test_a_test_of_ones_own_is_called_after_training(tiny_cfg):
    class Mine(Trainer):
        @classmethod
        def test(cls, cfg, model):
            assert not hasattr(model, "module")
            return {"mine": 1}

    assert _train(Mine(tiny_cfg(**SHORT))) == {"mine": 1}


def test_a_loader_of_ones_own_trains_and_is_estimated_on(tiny_cfg, caplog):
    """Detectron2's own loader knows no position, which a resumed run is told."""

    class Mine(Trainer):
        batches = []

        @classmethod
        def build_train_loader(cls, cfg):
            cls.batches.append((cfg.SOLVER.IMS_PER_BATCH, cfg.SEED))
            return build_detection_train_loader(
                load_datasets(cfg.DATASETS.TRAIN),
                mapper=SegmentationMapper(cfg, is_train=True),
                total_batch_size=cfg.SOLVER.IMS_PER_BATCH,
                aspect_ratio_grouping=False,
            )

    cfg = tiny_cfg(FISHER__IMS_PER_BATCH=3, DATASETS__TEST=())
    trainer = Mine(cfg)
    trainer.resume_or_load(resume=False)
    trainer.max_iter = 5
    trainer.train()
    assert Mine.batches == [(2, 42), (3, 43)]  # the second is the estimate's
    assert Path(cfg.OUTPUT_DIR, "fisher.safetensors").is_file()
    with caplog.at_level(logging.WARNING):
        resumed = Mine(cfg)
        resumed.resume_or_load(resume=True)
        resumed.train()
    assert "The loader of Mine.build_train_loader cannot go on" in caplog.text
    end = torch.load(Path(cfg.OUTPUT_DIR, "model_final.pth"), weights_only=True)
    assert end["iteration"] == 6


def test_a_test_set_that_fails_does_not_lose_the_scores_of_the_others(tiny_cfg, caplog):
    class Broken(DomainGeneralizationEvaluator):
        def process(self, inputs, outputs):
            raise DatasetError("image 3 is gone")

    class Mine(Trainer):
        @classmethod
        def build_evaluator(cls, cfg, dataset_name, output_folder=None):
            kind = Broken if dataset_name == "tiny_day" else DomainGeneralizationEvaluator
            return kind(cfg, dataset_name, output_dir=cfg.OUTPUT_DIR)

    # The tests on the way do not stop the training, and the other test set's scores count.
    cfg = tiny_cfg(TUNING__METHOD="freeze", TEST__EVAL_PERIOD=3, TEST__BEST_ON="tiny_night")
    with pytest.raises(DatasetError, match="image 3 is gone"):
        _train(Mine(cfg))
    assert caplog.text.count("Training goes on after a test set could not be scored") == 2
    assert Path(cfg.OUTPUT_DIR, "model_final.pth").is_file()
    results = json.loads(Path(cfg.OUTPUT_DIR, "results.json").read_text())
    assert list(results["targets"]) == ["tiny_night"] and not results["source"]
    assert results["failed"] == {"tiny_day": "image 3 is gone"}
    scores = Run(Path(cfg.OUTPUT_DIR)).score_series()
    assert [at for at, _ in scores["tiny_night"]] == [6]
    assert not {"tiny_day", "unseen"} & scores.keys()
    assert Path(cfg.OUTPUT_DIR, "model_best.pth").is_file()
