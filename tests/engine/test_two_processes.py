"""Two gloo processes through all three stages: replicas stay equal, and do what one would do."""

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog
from detectron2.engine import HookBase
from detectron2.utils import comm
from PIL import Image
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.multiprocessing import spawn

from fishertune_d2.config import default_config
from fishertune_d2.data import DatasetError, register_sem_seg
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.optimizer import is_backbone
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.evaluation import DomainGeneralizationEvaluator
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


class _SentBytes(HookBase):
    """The bytes of gradients that DDP sends in each step: the decoder's and the backbone's."""

    def __init__(self):
        self.seen = []
        self._wrapped = None

    def before_step(self) -> None:
        if self.trainer.model is not self._wrapped:  # a new stage
            self._wrapped = self.trainer.model
            self._wrapped.register_comm_hook(None, self._send)
        self.seen.append([0, 0])

    def _send(self, state: None, bucket: GradBucket) -> Future[torch.Tensor]:
        names = {p: name for name, p in self.trainer.segmentor.named_parameters()}
        sent = [0, 0]
        for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True):
            sent[is_backbone(names[parameter])] += gradient.nbytes
        assert sum(sent) == bucket.buffer().nbytes
        self.seen[-1] = [before + now for before, now in zip(self.seen[-1], sent, strict=True)]
        return allreduce_hook(None, bucket)


def _register(root: Path) -> None:
    for name in ("tiny_day", "tiny_night", "tiny_sparse", "tiny_one"):
        if name not in DatasetCatalog:
            register_sem_seg(name, root / name / "images", root / name / "labels", CLASSES)


class _Broken(DomainGeneralizationEvaluator):
    """Cannot read an image of its share, in the second process."""

    def process(self, inputs: list, outputs: list) -> None:
        if comm.get_rank() == 1:
            raise DatasetError("image 4 is gone")
        super().process(inputs, outputs)


def _score(rank: int, root: Path, folder: Path, cfg) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    _register(root)
    model = Trainer.build_model(cfg)
    model.load_state_dict(model.state_dict())
    kinds = (_Broken, DomainGeneralizationEvaluator)
    evaluators = [
        kind(cfg, name, output_dir=cfg.OUTPUT_DIR)
        for kind, name in zip(kinds, cfg.DATASETS.TEST, strict=True)
    ]
    try:
        Trainer.test(cfg, model, evaluators)
    except DatasetError as error:
        (folder / f"{rank}.txt").write_text(str(error))
    comm.synchronize()  # gloo aborts a process that leaves while another one still computes


def test_what_stops_one_process_at_a_test_set_does_not_lose_the_others(
    tiny_data, tiny_cfg, tmp_path
):
    cfg = tiny_cfg(TEST__PICTURES=0)
    spawn(_score, (tiny_data, tmp_path, cfg), nprocs=2)
    for rank in range(2):
        assert (tmp_path / f"{rank}.txt").read_text() == "image 4 is gone"
    results = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    assert list(results["targets"]) == ["tiny_night"]
    assert results["failed"] == {"tiny_day": "image 4 is gone"}


def _process(rank: int, config: str, root: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    _register(root)
    cfg = default_config()
    cfg.merge_from_file(config)
    checksums, sent, sent_by_full = _Checksums(), _SentBytes(), _SentBytes()
    trainer = Trainer(cfg)
    trainer.register_hooks([checksums, sent])
    trainer.train()
    full = ["TUNING.METHOD", "full", "TUNING.WARMUP_ITERS", 1, "SOLVER.MAX_ITER", 3]
    cfg.merge_from_list([*full, "DATASETS.TEST", (), "OUTPUT_DIR", str(folder / "full")])
    trainer = Trainer(cfg)
    trainer.register_hooks([sent_by_full])
    trainer.train()
    seen = {"weights": checksums.seen, "sent": sent.seen, "sent by full": sent_by_full.seen}
    (folder / f"seen_{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def sparse_data(tiny_data) -> Path:
    """``tiny_sparse``: seven images, an odd number; three of them have no labelled pixel.

    ``tiny_one``: one image, so that a process has none.
    """
    source, target, one = (tiny_data / f"tiny_{name}" for name in ("day", "sparse", "one"))
    for folder in ("images", "labels"):
        (target / folder).mkdir(parents=True)
        (one / folder).mkdir(parents=True)
        shutil.copy(source / folder / "0.png", one / folder)
    for i in range(7):
        image = Image.open(source / "images" / f"{i % 6}.png")
        label = Image.open(source / "labels" / f"{i % 6}.png")
        if i % 2:
            label = Image.fromarray(np.full((64, 64), 255, np.uint8))
        image.save(target / "images" / f"{i}.png")
        label.save(target / "labels" / f"{i}.png")
    _register(tiny_data)
    yield tiny_data
    for name in ("tiny_sparse", "tiny_one"):
        DatasetCatalog.remove(name)


@pytest.fixture
def two(tiny_cfg, sparse_data, tmp_path):
    """The config of a run by two processes, and what each saw."""
    cfg = tiny_cfg(
        MODEL__DEVICE="cpu",  # gloo
        DATASETS__TRAIN=("tiny_sparse",),
        DATASETS__TEST=("tiny_sparse", "tiny_night", "tiny_one"),
        SOLVER__IMS_PER_BATCH=4,
        SOLVER__ACCUMULATE=2,  # an image at a time; gradients are sent once a step all the same
        SOLVER__MAX_ITER=STEPS,
        SOLVER__CHECKPOINT_PERIOD=STEPS,
        TUNING__WARMUP_ITERS=WARMUP,
        FISHER__BATCHES=4,
    )
    config = tmp_path / "config.yaml"
    config.write_text(cfg.dump())
    spawn(_process, (str(config), sparse_data, tmp_path), nprocs=2)
    return cfg, [json.loads((tmp_path / f"seen_{r}.json").read_text()) for r in range(2)]


def test_replicas_stay_equal_and_send_little_and_results_are_those_of_one_process(two, tiny_cfg):
    cfg, (first, second) = two
    out = Path(cfg.OUTPUT_DIR)
    weights = first["weights"]
    assert len(weights) == STEPS
    assert weights == second["weights"]
    assert len(set(weights)) == STEPS  # every step moved something

    # Gradients: the decoder's in every step, the selected weights' after warm-up.
    decoder, full = first["sent by full"][-1]
    selected = first["sent"][-1][1]
    assert 0 < selected <= 0.06 * full
    tuning = STEPS - WARMUP
    assert first["sent"] == WARMUP * [[decoder, 0]] + tuning * [[decoder, selected]]

    # Evaluation: one process alone scores the same model the same.
    results = json.loads((out / "results.json").read_text())
    Trainer.test(cfg, build_trained(cfg, str(out / "model_final.pth")))
    assert json.loads((out / "results.json").read_text()) == results

    # Estimation: one process alone measures the same after the same warm-up.
    alone = tiny_cfg(
        "alone",
        MODEL__DEVICE="cpu",
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
