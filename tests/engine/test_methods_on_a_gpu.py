"""Every way of tuning trains on a GPU, is written, is read again and predicts."""

from pathlib import Path

import numpy as np
import pytest

from fishertune_d2.engine import Trainer
from fishertune_d2.predict import Predictor, read_run
from fishertune_d2.tuning.peft_tuners import _usable_tuners
from fishertune_d2.tuning.registry import TUNING_REGISTRY

SMALL = {
    "TUNING__VPT__NUM_TOKENS": 4,
    "TUNING__VQT__NUM_TOKENS": 4,
    "TUNING__ADAPTFORMER__DIM": 4,
    "TUNING__REIN__RANK": 2,
    "SOLVER__MAX_ITER": 4,
    "TUNING__WARMUP_ITERS": 2,
    "SOLVER__CHECKPOINT_PERIOD": 100,
    "TEST__PICTURES": 0,
}
# Their defaults do not divide the widths of the tiny model.
PEFT_OPTIONS = {"C3A": ["block_size", 16], "VBLORA": ["vector_length", 16]}
PRECISIONS = {
    "float32": {},
    "bfloat16": {"SOLVER__AMP__ENABLED": True},
    "float16": {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": "float16"},
}


def _trains_and_predicts(cfg) -> None:
    trainer = Trainer(cfg)
    trainer.train()
    assert all(p.is_cuda for p in trainer.segmentor.parameters())
    assert all(b.is_cuda for b in trainer.segmentor.buffers())
    file = Path(cfg.OUTPUT_DIR, "config.yaml")
    file.write_text(cfg.dump())
    prediction = Predictor(read_run(file))(np.zeros((48, 64, 3), np.uint8))
    assert prediction.classes.shape == prediction.confidence.shape == (48, 64)
    assert np.isfinite(prediction.confidence).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", sorted(name for name, _ in TUNING_REGISTRY if name != "peft"))
def test_method(tiny_cfg, method, precision):
    _trains_and_predicts(tiny_cfg(TUNING__METHOD=method, **SMALL, **PRECISIONS[precision]))


@pytest.mark.parametrize("name", [*_usable_tuners(), "DORA"])
def test_tuner_of_peft(tiny_cfg, name):
    options = {"TUNING__PEFT__TYPE": name, "TUNING__PEFT__OPTIONS": PEFT_OPTIONS.get(name, [])}
    _trains_and_predicts(tiny_cfg(TUNING__METHOD="peft", **options, **SMALL))


@pytest.mark.parametrize("method", ["fishertune", "full", "lora", "rein", "set", "vpt"])
def test_checkpointed_blocks(tiny_cfg, method):
    options = {"MODEL__VFM__CHECKPOINT_BLOCKS": True, "SOLVER__AMP__ENABLED": True}
    _trains_and_predicts(tiny_cfg(TUNING__METHOD=method, **options, **SMALL))


def test_workers_that_are_forked_from_a_process_with_a_gpu(tiny_cfg):
    _trains_and_predicts(tiny_cfg(**SMALL | {"DATALOADER__NUM_WORKERS": 2}))
