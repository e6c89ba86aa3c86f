"""A run's folder with a tiny model of three classes, in the state that training leaves it in."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import build_model
from PIL import Image

from fishertune_d2.config import default_config
from fishertune_d2.data import register_sem_seg
from fishertune_d2.engine import WholeCheckpointer
from fishertune_d2.engine.stages import attach
from fishertune_d2.tuning import build_tuning_method

CLASSES = ["ground", "wall", "sky"]
COLORS = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this folder."""


@pytest.fixture
def image() -> np.ndarray:
    """Noise, (40, 56, 3) uint8 RGB."""
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


@pytest.fixture
def town(tmp_path, image) -> Iterator[str]:
    """The name of a registered data set with one image, tested at 98 x 70."""
    for folder, pixels in (("images", image), ("labels", np.zeros((40, 56), np.uint8))):
        (tmp_path / "town" / folder).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / "town" / folder / "a.png")
    folders = tmp_path / "town/images", tmp_path / "town/labels"
    register_sem_seg("town", *folders, CLASSES, colors=COLORS, test_size=(98, 70))
    yield "town"
    DatasetCatalog.remove("town")
    MetadataCatalog.remove("town")


@pytest.fixture
def make_run(tmp_path, tiny_head, device) -> Callable[..., CfgNode]:
    """Returns a function that writes config.yaml and model_final.pth, and returns the config.

    Keys are given with a double underscore for the dot.
    """

    def make(output: str = "run", seed: int = 0, **overrides) -> CfgNode:
        cfg = default_config()
        options = {
            **tiny_head,
            "MODEL.DEVICE": device,
            "MODEL.VFM.NAME": "tiny",
            "MODEL.VFM.WEIGHTS": "random",
            "MODEL.VFM.IMG_SIZE": [48, 64],
            "DATASETS.TRAIN": (),
            "DATASETS.TEST": ("town",),
            "TEST.MODE": "whole",
            "OUTPUT_DIR": str(tmp_path / output),
        }
        options |= {key.replace("__", "."): value for key, value in overrides.items()}
        for key, value in options.items():
            cfg.merge_from_list([key, value])
        folder = Path(cfg.OUTPUT_DIR)
        folder.mkdir()
        torch.manual_seed(seed)
        model, method = build_model(cfg), build_tuning_method(cfg)
        if method.adds:
            attach(model, method)
        with torch.no_grad():  # what a method adds begins at 0, and training moves it
            for parameter in model.parameters():
                parameter += 0.2 * torch.randn_like(parameter)
        WholeCheckpointer(model, str(folder)).save("model_final", iteration=0)
        # As a finished run's: found by itself here, and on no other machine.
        cfg.MODEL.VFM.WEIGHTS = "/gone/public.safetensors"
        (folder / "config.yaml").write_text(cfg.dump())
        return cfg

    return make
