"""The table of unread keys says what a training does: every key of Detectron2 is in one of them."""

import fnmatch
import logging

import pytest
from detectron2.config import CfgNode, get_cfg

from fishertune_d2.config import CONFIGS, RECIPE, default_config, read_config
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.engine import Trainer
from fishertune_d2.unread_keys import (
    UNREAD,
    stock_keys,
    unread_keys,
    warn_of_unread_keys,
    why_unread,
)

# What else reads a key than a training: Detectron2's set-up of a process, and its config reader.
READ_ELSEWHERE = {"VERSION", "CUDNN_BENCHMARK"}
# Handed on by every training, and used by one of the samplers alone.
READ_IN_VAIN = {"DATALOADER.REPEAT_THRESHOLD"}
READ: set[str] = set()


class _Recording(CfgNode):
    """A config that remembers which of its keys were asked for, also of its copies."""

    def __getattr__(self, name: str):
        value = super().__getattr__(name)
        if not isinstance(value, CfgNode):
            READ.add(self.__dict__.get("path", "") + name)
        return value


def _recording(cfg: CfgNode, prefix: str = "") -> _Recording:
    node = _Recording()
    for name, value in cfg.items():
        inner = isinstance(value, CfgNode)
        dict.__setitem__(node, name, _recording(value, f"{prefix}{name}.") if inner else value)
    node.__dict__["path"] = prefix
    return node


STEPS = {"SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR", "SOLVER__STEPS": (5, 6)}
CONFIGS_THAT_TRAIN = {
    "as it is": {},
    "SGD in steps": STEPS | {"SOLVER__OPTIMIZER": "SGD", "TUNING__METHOD": "full"},
    "clipped": {
        "SOLVER__CLIP_GRADIENTS__ENABLED": True,
        "SOLVER__CLIP_GRADIENTS__CLIP_TYPE": "full_model",
        "TUNING__METHOD": "freeze",
    },
}


@pytest.mark.parametrize("name", CONFIGS_THAT_TRAIN)
def test_every_key_is_read_by_a_training_or_in_the_table(name, tiny_cfg):
    cfg = tiny_cfg(**CONFIGS_THAT_TRAIN[name])
    READ.clear()
    trainer = Trainer(_recording(cfg))
    trainer.resume_or_load(resume=False)
    trainer.train()
    unread = {key for key in stock_keys() if why_unread(key, cfg) is not None}
    assert sorted(unread & READ - READ_IN_VAIN) == []
    assert sorted(stock_keys().keys() - READ - unread - READ_ELSEWHERE) == []


def test_every_pattern_is_of_a_key():
    patterns = [pattern for unread in UNREAD for pattern in unread.keys.split()]
    keys = dict(dotted_items(default_config()))
    assert [p for p in patterns if not fnmatch.filter(keys, p)] == []
    for key in keys:  # else the first entry would hide the others
        assert sum(fnmatch.fnmatchcase(key, p) for p in patterns) <= 1, key


def _warnings(cfg: CfgNode, caplog) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "fishertune_d2.unread_keys"):
        warn_of_unread_keys(cfg)
    return [record.getMessage() for record in caplog.records]


def test_one_warning_names_all_keys_and_what_to_use(caplog):
    options = ["INPUT.MIN_SIZE_TEST", "512", "INPUT.MAX_SIZE_TEST", "2048"]
    options += ["TEST.AUG.ENABLED", "True", "SOLVER.STEPS", "(100,)"]
    (said,) = _warnings(read_config(RECIPE, options), caplog)
    assert "  INPUT.MIN_SIZE_TEST, INPUT.MAX_SIZE_TEST: TEST.SIZES says" in said
    assert "  TEST.AUG.ENABLED: there is no test-time augmentation" in said
    assert "  SOLVER.STEPS: SOLVER.LR_SCHEDULER_NAME WarmupMultiStepLR reads it" in said


def test_a_key_is_not_named_where_something_reads_it():
    options = ["SOLVER.STEPS", "(100,)", "SOLVER.MOMENTUM", "0.5", "MODEL.RESNETS.DEPTH", "101"]
    options += ["MODEL.SEM_SEG_HEAD.NORM", "BN", "MODEL.ROI_HEADS.NUM_CLASSES", "3"]
    options += ["DATALOADER.RARE_CLASS_PIXELS", "1000"]
    keys = options[::2]
    assert sorted(unread_keys(read_config(RECIPE, options))) == sorted(keys)
    read = {
        "DATALOADER.RARE_CLASS_PIXELS": ("DATALOADER.SAMPLER_TRAIN", "RareClassSampler"),
        "SOLVER.STEPS": ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR"),
        "SOLVER.MOMENTUM": ("SOLVER.OPTIMIZER", "SGD"),
        "MODEL.RESNETS.DEPTH": ("MODEL.BACKBONE.NAME", "build_resnet_backbone"),
        "MODEL.SEM_SEG_HEAD.NORM": ("MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"),
    }
    for key, change in read.items():
        assert key not in unread_keys(read_config(RECIPE, [*options, *change]))
    other = read_config(RECIPE, [*options, "MODEL.META_ARCHITECTURE", "GeneralizedRCNN"])
    data = ["DATALOADER.RARE_CLASS_PIXELS"]
    assert sorted(unread_keys(other)) == [*data, "SOLVER.MOMENTUM", "SOLVER.STEPS"]


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: path.stem)
def test_a_shipped_config_sets_no_such_key(file, caplog):
    assert _warnings(read_config(str(file)), caplog) == []


def test_the_stock_keys_are_detectron2s():
    assert stock_keys()["INPUT.MIN_SIZE_TEST"] == get_cfg().INPUT.MIN_SIZE_TEST
    assert not [key for key in stock_keys() if key.startswith(("FISHER", "TUNING", "MODEL.VFM"))]
