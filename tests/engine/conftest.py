"""A tiny three-stage training run through the real Trainer."""

import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image
from safetensors.torch import save_file
from tqdm import tqdm

from fishertune_d2.config import default_config
from fishertune_d2.data import register_sem_seg
from fishertune_d2.engine import Trainer

from ..conftest import DEVICE

# On a CPU other tests say the same and more.
collect_ignore = ["test_methods_on_a_gpu.py"] if DEVICE == "cpu" else []

CLASSES = ["ground", "wall", "sky"]
# On a GPU the backward pass of grid_sample adds with atomics, in another order every time. Only a
# CPU, and so the fake device, repeats a run to the bit.
EXACT = DEVICE == "cpu" or not torch.cuda.is_available() or "fake" in torch.cuda.get_device_name()
TOLERANCE = 0.0 if EXACT else 1e-2
# Of two runs that should be one, ||a - b|| / ||b|| over all tensors together. Single tensors differ
# more: a key's bias has no gradient but rounding, and AdamW makes whole steps of it. On a CPU, with
# noise of 1e-6 in the gradient of grid_sample, weights came out 0.0003 apart and moments 0.004. A
# resumed run that loses moments, steps or the random state ends with moments 0.03 to 0.8 apart.
WEIGHTS_APART, MOMENTS_APART = (0.0, 0.0) if EXACT else (1e-3, 2e-2)


def same_states(
    one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor], apart: float = WEIGHTS_APART
) -> bool:
    """Whether two runs computed the same: bit for bit on a CPU, within ``apart`` on a GPU."""
    if one.keys() != other.keys():
        return False
    pairs = [(tensor.detach().cpu(), other[name].detach().cpu()) for name, tensor in one.items()]
    if EXACT:
        return all(torch.equal(a, b) for a, b in pairs)
    floats = [(a.double(), b.double()) for a, b in pairs if a.is_floating_point()]
    whole = sum(float(b.norm()) ** 2 for _, b in floats)
    return all(torch.equal(a, b) for a, b in pairs if not a.is_floating_point()) and (
        sum(float((a - b).norm()) ** 2 for a, b in floats) <= apart**2 * whole
    )


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this folder."""


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """Bands of three classes, ``tiny_day``, and a darker copy of them, ``tiny_night``."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for name, light in (("tiny_day", 1.0), ("tiny_night", 0.3)):
        for folder in ("images", "labels"):
            (root / name / folder).mkdir(parents=True)
        for i in range(6):
            label = np.repeat([2, 1, 0], rng.multinomial(64, [1 / 3] * 3))[:, None]
            label = np.broadcast_to(label, (64, 64)).astype(np.uint8)
            image = light * (60 * label[..., None] + rng.integers(0, 100, (64, 64, 3)))
            Image.fromarray(image.astype(np.uint8)).save(root / name / "images" / f"{i}.png")
            Image.fromarray(label).save(root / name / "labels" / f"{i}.png")
    _register(root)
    yield root
    for name in ("tiny_day", "tiny_night"):
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


def _register(root: Path) -> None:
    for name in ("tiny_day", "tiny_night"):
        folder = root / name
        register_sem_seg(name, folder / "images", folder / "labels", CLASSES)


@pytest.fixture
def start_process(tiny_data, monkeypatch) -> Callable[..., BaseProcess]:
    """Returns a function that calls another in a process of its own, which has the tiny data.

    The processes are forks of one that has imported everything and started no thread.
    """
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fishertune_d2.engine"])

    def start(function: Callable, *args) -> BaseProcess:
        process = context.Process(target=_with_tiny_data, args=(tiny_data, function, *args))
        process.start()
        return process

    return start


def _with_tiny_data(root: Path, function: Callable, *args) -> None:
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own, between processes, outlives one that is killed
    _register(root)
    function(*args)


@pytest.fixture
def tiny_cfg(tiny_data, tiny_head, device, tmp_path) -> Callable[..., CfgNode]:
    """Returns a function that makes a config: T1 = 3, T3 = 4, a ViT of 6 blocks; takes overrides.

    Keys are given with a double underscore for the dot.
    """
    return partial(make_cfg, tmp_path, {**tiny_head, "MODEL.DEVICE": device})


@pytest.fixture
def public(tmp_path) -> str:
    """Public weights of the VFM "tiny"."""
    torch.manual_seed(5)
    path = tmp_path / "public.safetensors"
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), path)
    return str(path)


# The tiny model and its data, whatever the recipe.
TINY = {
    "MODEL.VFM.NAME": "tiny",
    "MODEL.VFM.WEIGHTS": "random",
    "MODEL.VFM.IMG_SIZE": [48, 64],
    "DATASETS.TRAIN": ("tiny_day",),
    "DATASETS.TEST": ("tiny_day", "tiny_night"),
    "INPUT.MIN_SIZE_TRAIN": [48, 64],
    "INPUT.CROP.SIZE": [48, 64],
    "TEST.MODE": "whole",
}


def make_cfg(root: Path, options: dict, output: str = "out", **overrides) -> CfgNode:
    cfg = default_config()
    options = {
        **options,
        **TINY,
        "TEST.PICTURES": 1,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.BASE_LR": 1e-3,
        "SOLVER.BACKBONE_MULTIPLIER": 1.0,
        "SOLVER.MAX_ITER": 7,
        "SOLVER.CHECKPOINT_PERIOD": 1,
        "TUNING.WARMUP_ITERS": 3,
        "FISHER.BATCHES": 2,
        "FISHER.IMS_PER_BATCH": 2,
        "DATALOADER.NUM_WORKERS": 0,
        "OUTPUT_DIR": str(root / output),
    }
    options |= {key.replace("__", "."): value for key, value in overrides.items()}
    for key, value in options.items():
        cfg.merge_from_list([key, value])
    Path(cfg.OUTPUT_DIR).mkdir(parents=True, exist_ok=True)
    return cfg


@pytest.fixture(scope="session")
def finished_run(tiny_data, tiny_head, device, tmp_path_factory) -> Path:
    """The folder of an undisturbed run of ``tiny_cfg()``. Tests that write must copy it."""
    root = tmp_path_factory.mktemp("finished")
    with on_one_thread():
        train(make_cfg(root, {**tiny_head, "MODEL.DEVICE": device}))
    return root / "out"


def train(cfg: CfgNode, *hooks: HookBase, resume: bool = False, stop: int | None = None) -> Trainer:
    """Begins or resumes a run, and trains to its end, or fails before the iteration ``stop``."""
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=resume)
    trainer.register_hooks(list(hooks))
    if stop is None:
        trainer.train()
        return trainer
    trainer.register_hooks([_StopBefore(stop)])
    with pytest.raises(InterruptedError):
        trainer.train()
    return trainer


class _StopBefore(HookBase):
    """Raises before an iteration, after the checkpoint of the iteration before it is written."""

    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise InterruptedError


@contextmanager
def on_one_thread() -> Iterator[None]:
    """One thread, for fixtures that live longer than a test: sums on two differ in the last bit."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def final_state(folder: str | Path) -> dict:
    """The last checkpoint of a finished run."""
    return torch.load(Path(folder) / "model_final.pth", weights_only=True)


def same_end(one: str | Path, other: str | Path) -> bool:
    """Whether two finished runs have the same weights and optimizer's moments."""
    ends = [final_state(folder) for folder in (one, other)]
    models = [end["model"] for end in ends]
    states = [end["trainer"]["_trainer"]["optimizer"]["state"] for end in ends]
    if states[0].keys() != states[1].keys():
        return False
    kinds = {key for state in states[0].values() for key in state}  # exp_avg, exp_avg_sq, step
    moments = [[{i: state[kind] for i, state in each.items()} for each in states] for kind in kinds]
    return same_states(*models) and all(same_states(*pair, MOMENTS_APART) for pair in moments)
