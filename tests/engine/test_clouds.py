"""The two stages of CLOUDS on a tiny ConvNeXt, from the configs that come with the package."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.config import get_config_file, read_config
from fishertune_d2.engine import Trainer, self_training
from fishertune_d2.engine.trained_model import build_trained

from .conftest import TINY, train

NAMES = ["ground, road", "wall", "sky"]


@pytest.fixture
def stage(tmp_path, tiny_data, tiny_head, device):
    """Returns a function that reads one of the configs, with a tiny model and tiny data."""
    pytest.importorskip("open_clip")
    rng = np.random.default_rng(1)
    (tmp_path / "unlabelled").mkdir()
    for i in range(3):
        pixels = rng.integers(0, 200, (96, 120, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"unlabelled/{i}.png")

    def read(name, **overrides):
        keys = tiny_head | TINY | {
            "MODEL.VFM.NAME": "tiny_convnext", "MODEL.TEXT.NAME": "tiny", "MODEL.DEVICE": device,
            "MODEL.TEXT.WEIGHTS": "random", "MODEL.TEXT.CLASSES": NAMES, "DATASETS.TEST": (),
            "INPUT.MIN_SIZE_TRAIN": [96], "INPUT.CROP.SIZE": [96, 96], "TEST.PROTOCOL": "",
            "SOLVER.IMS_PER_BATCH": 3, "SOLVER.MAX_ITER": 3, "SOLVER.AMP.ENABLED": False,
            "SOLVER.FUSED": False, "DATALOADER.NUM_WORKERS": 0, "SOLVER.BASE_LR": 1e-3,
            "OUTPUT_DIR": str(tmp_path / name),
        }  # fmt: skip
        keys |= {key.replace("__", "."): value for key, value in overrides.items()}
        options = [x for pair in keys.items() for x in pair]
        cfg = read_config(get_config_file(f"{name}.yaml"), options)
        Path(cfg.OUTPUT_DIR).mkdir(exist_ok=True)
        return cfg

    return read


def test_a_trained_head_labels_for_the_second_stage(stage, sam_folder, tmp_path):
    first = stage("clouds_convnext")
    trainer = train(first)
    head = trainer.segmentor.sem_seg_head
    (group,) = [
        g for g in trainer.optimizer.param_groups
        if any(p is head.class_predictor.no_object.weight for p in g["params"])
    ]  # fmt: skip
    assert group["weight_decay"] == 0.0
    weights = str(Path(first.OUTPUT_DIR) / "model_final.pth")
    torch.manual_seed(8)  # the untrained text tower is another one now
    model = build_trained(first, weights)
    image = torch.randint(0, 256, (3, 64, 96))
    with torch.no_grad():
        expected = trainer.segmentor.eval().scores(image)
        assert torch.equal(model.scores(image), expected)
    others = {"MODEL__WEIGHTS": weights, "MODEL__TEXT__CLASSES": ["night sky", "tower", "street"]}
    words = "the class 'ground, road' and reads 'night sky' .* Set MODEL.TEXT.CLASSES to .'ground"
    with pytest.raises(ValueError, match=words):
        Trainer(stage("clouds_convnext", **others)).resume_or_load(resume=False)
    second = stage(
        "clouds_convnext_self_training", MODEL__WEIGHTS=weights, SELF_TRAINING__SAM=sam_folder,
        SELF_TRAINING__IMAGES=str(tmp_path / "unlabelled"), SELF_TRAINING__PERIOD=1,
    )  # fmt: skip
    start = torch.load(weights, weights_only=True)["model"]
    seen = []
    trainer = _spied(second, seen)
    assert len(seen) == 6 and all(set(np.unique(label)) <= {0, 1, 2, 255} for label in seen)
    assert any((label < 3).any() for label in seen)
    end = trainer.segmentor.state_dict()
    for name in start:
        fixed = name.startswith("backbone.") or name.endswith("class_predictor.texts.embeddings")
        assert not fixed or torch.equal(start[name], end[name].cpu())
    assert not torch.equal(
        start["sem_seg_head.class_predictor.embed.0.weight"],
        end["sem_seg_head.class_predictor.embed.0.weight"].cpu(),
    )


def _spied(cfg, seen):
    """Trains, and keeps the labels that SAM has refined."""
    original = self_training.refine

    def refine(*args):
        seen.append(original(*args))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(self_training, "refine", refine)
        return train(cfg)
