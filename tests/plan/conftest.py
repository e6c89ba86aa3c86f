"""A config small enough to compute for real."""

from collections.abc import Callable

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.config import default_config
from fishertune_d2.engine.stages import prepare_stage
from fishertune_d2.fisher import Selection, Units
from fishertune_d2.tuning import build_tuning_method

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VFM.NAME": "tiny",
    "MODEL.VFM.WEIGHTS": "random",
    "MODEL.VFM.IMG_SIZE": [48, 64],
    "INPUT.CROP.SIZE": [48, 64],
    "TEST.CROP_SIZE": [48, 64],
    "TEST.STRIDE": [32, 32],
    "DATASETS.TRAIN": ("nobody_has_it",),
    "DATASETS.TEST": ("nobody_has_it",),
    "SOLVER.IMS_PER_BATCH": 2,
    "FISHER.IMS_PER_BATCH": 2,
}


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this folder."""


@pytest.fixture(scope="session")
def small_cfg(tiny_head) -> Callable[..., CfgNode]:
    """Returns a function that makes the config; in its overrides "__" stands for the dot."""

    def make(**overrides) -> CfgNode:
        cfg = default_config()
        options = (
            SMALL | tiny_head | {key.replace("__", "."): value for key, value in overrides.items()}
        )
        for key, value in options.items():
            cfg.merge_from_list([key, value])
        return cfg

    return make


@pytest.fixture
def real_model() -> Callable[..., nn.Module]:
    """Returns a function that builds a real model, prepared as the trainer prepares a stage."""

    def make(cfg: CfgNode, stage: str) -> nn.Module:
        torch.manual_seed(0)
        model, method = build_model(cfg).train(), build_tuning_method(cfg)
        selection = None
        if method.selects:
            parameters = method.parameters(model.backbone)
            scores = {name: torch.rand(p.shape) for name, p in parameters.items()}
            base = sum(p.numel() for p in model.backbone.parameters())
            shapes = {name: tuple(p.shape) for name, p in parameters.items()}
            units, share = Units(cfg.TUNING.UNIT, shapes), cfg.TUNING.D_MAX
            selection = Selection.from_scores(units.mean(scores), share, base, units, "layer")
        selected = prepare_stage(model, stage, method, selection)[1]
        if selected is not None:
            selected.grow(cfg.TUNING.D_MAX)
        return model

    return make


@pytest.fixture(scope="session")
def real_batch() -> Callable[[int], list[dict]]:
    """Returns a function that makes images of 48 x 64, each of which holds all three classes."""

    def make(images: int) -> list[dict]:
        label = torch.arange(3).repeat_interleave(16)[:, None].expand(48, 64).contiguous()
        generator = torch.Generator().manual_seed(0)
        image = torch.randint(0, 256, (images, 3, 48, 64), dtype=torch.uint8, generator=generator)
        return [{"image": each, "sem_seg": label} for each in image]

    return make
