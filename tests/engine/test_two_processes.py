"""Two gloo processes through all three stages: replicas stay equal, and do what one would do."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch.multiprocessing import spawn

from fishertune_d2 import add_fishertune_config
from fishertune_d2.data import register_sem_seg
from fishertune_d2.engine import Trainer
from fishertune_d2.fisher import FisherEstimate

from .conftest import CLASSES

STEPS, WARMUP = 30, 10


class _Checksums(HookBase):
    """The hash of all weights after every step."""

    def __init__(self):
        self.seen = []

    def after_step(self) -> None:
        digest = hashlib.sha256()
        for value in self.trainer.segmentor.state_dict().values():
            digest.update(value.numpy().tobytes())
        self.seen.append(digest.hexdigest())


def _register(root: Path) -> None:
    for name in ("tiny_day", "tiny_night", "tiny_sparse"):
        if name not in DatasetCatalog:
            register_sem_seg(name, root / name / "images", root / name / "labels", CLASSES)


def _process(rank: int, config: str, root: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    _register(root)
    cfg = get_cfg()
    add_fishertune_config(cfg)
    cfg.merge_from_file(config)
    trainer = Trainer(cfg)
    checksums = _Checksums()
    trainer.register_hooks([checksums])
    trainer.train()
    (folder / f"checksums_{rank}.json").write_text(json.dumps(checksums.seen))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sparse_data(tiny_data) -> Path:
    """``tiny_sparse``: seven images, an odd number; three of them have no labelled pixel."""
    source, target = tiny_data / "tiny_day", tiny_data / "tiny_sparse"
    for folder in ("images", "labels"):
        (target / folder).mkdir(parents=True)
    for i in range(7):
        image = Image.open(source / "images" / f"{i % 6}.png")
        label = Image.open(source / "labels" / f"{i % 6}.png")
        if i % 2:
            label = Image.fromarray(np.full((64, 64), 255, np.uint8))
        image.save(target / "images" / f"{i}.png")
        label.save(target / "labels" / f"{i}.png")
    _register(tiny_data)
    yield tiny_data
    DatasetCatalog.remove("tiny_sparse")


@pytest.fixture
def two(tiny_cfg, sparse_data, tmp_path):
    """The config of a run by two processes, and the checksums of each."""
    cfg = tiny_cfg(
        DATASETS__TRAIN=("tiny_sparse",),
        DATASETS__TEST=("tiny_sparse", "tiny_night"),
        SOLVER__MAX_ITER=STEPS,
        SOLVER__CHECKPOINT_PERIOD=STEPS,
        TUNING__WARMUP_ITERS=WARMUP,
        FISHER__BATCHES=4,
    )
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    spawn(_process, (str(config), sparse_data, tmp_path), nprocs=2)
    return cfg, [json.loads((tmp_path / f"checksums_{r}.json").read_text()) for r in range(2)]


def test_replicas_stay_equal_and_results_are_those_of_one_process(two, tiny_cfg):
    cfg, (first, second) = two
    out = Path(cfg.OUTPUT_DIR)
    assert len(first) == STEPS
    assert first == second
    assert len(set(first)) == STEPS  # every step moved something

    # Evaluation: one process alone scores the same model the same.
    results = json.loads((out / "results.json").read_text())
    model = Trainer.build_model(cfg)
    final = torch.load(out / "model_final.pth", weights_only=True)["model"]
    model.load_state_dict(final)
    Trainer.test(cfg, model)
    assert json.loads((out / "results.json").read_text()) == results

    # Estimation: one process alone measures the same after the same warm-up.
    alone = tiny_cfg(
        "alone",
        DATASETS__TRAIN=("tiny_sparse",),
        SOLVER__MAX_ITER=STEPS,
        TUNING__WARMUP_ITERS=WARMUP,
        TUNING__WARMUP_CHECKPOINT=str(out / "model_warmup.pth"),
        FISHER__BATCHES=4,
    )
    trainer = Trainer(alone)
    trainer.resume_or_load(resume=False)
    estimate = trainer._estimate()
    together = FisherEstimate.load(out / "fisher.safetensors")
    assert together.images == estimate.images == 8
    assert together.shift_weight == pytest.approx(estimate.shift_weight, rel=1e-6)
    for one, both in ((estimate.f, together.f), (estimate.shifted, together.shifted)):
        for name, value in one.items():
            # Sums of float32 in another order: small against a tensor's largest entry.
            atol = 1e-5 * float(value.max())
            torch.testing.assert_close(both[name], value, rtol=1e-3, atol=atol)
