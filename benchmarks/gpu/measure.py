"""The parts that all GPU benchmarks share: config, images of noise, time, memory and counts."""

import argparse
import gc
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode

from fishertune_d2.config import read_config
from fishertune_d2.data import register_sem_seg

ROOT = Path(__file__).resolve().parents[2]
GIB = 2**30
NAME, CLASSES = "noise_of_the_benchmark", 19
# The fastest comes first: if the time runs out, only the last is missing.
PRECISIONS: dict[str, dict[str, object]] = {
    "TF32": {"SOLVER.MATMUL_PRECISION": "high", "SOLVER.AMP.ENABLED": False},
    "bfloat16": {"SOLVER.MATMUL_PRECISION": "high", "SOLVER.AMP.ENABLED": True},
    "float32": {"SOLVER.MATMUL_PRECISION": "highest", "SOLVER.AMP.ENABLED": False},
}
# The model and the images are so small that a CPU runs all parts in seconds.
_TINY = {
    "MODEL.VFM.NAME": "tiny",
    "MODEL.VFM.IMG_SIZE": [64, 64],
    "INPUT.CROP.SIZE": [64, 64],
    "INPUT.MIN_SIZE_TRAIN": [64],
    "TEST.CROP_SIZE": [64, 64],
    "TEST.STRIDE": [43, 43],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "TUNING.D_MIN": 0.05,
    "DATALOADER.NUM_WORKERS": 0,
}


def configure(
    args: argparse.Namespace, output: Path, options: Mapping[str, object] | None = None
) -> CfgNode:
    """Returns the config of the paper's setting on noise.

    Args:
        args: the command line: the device, the number of steps, and whether the sizes are tiny.
        output: OUTPUT_DIR.
        options: keys and values that override those of the benchmark.
    """
    keys: dict[str, object] = {
        "MODEL.VFM.WEIGHTS": "random",
        "MODEL.DEVICE": args.device,
        "DATASETS.TRAIN": (NAME,),
        "DATASETS.TEST": (NAME,),
        "SOLVER.MAX_ITER": args.steps,
        "TUNING.WARMUP_ITERS": 0,
        "FISHER.BATCHES": 2,
        "TEST.PICTURES": 0,
        "OUTPUT_DIR": output,
    }
    keys |= _TINY if args.tiny else {}
    keys |= options or {}
    words = [word for pair in keys.items() for word in (pair[0], str(pair[1]))]
    return read_config(str(ROOT / "configs/fishertune_dinov2.yaml"), words)


def write_noise(root: Path, size: tuple[int, int], count: int) -> None:
    """Writes and registers images of coarse blocks and fine noise, each block of one class.

    Args:
        root: an empty folder.
        size: height and width in pixels.
        count: the number of images.
    """
    rng = np.random.default_rng(0)
    (root / "images").mkdir()
    (root / "labels").mkdir()
    side = max(size[0] // 16, 1)
    for k in range(count):
        blocks = rng.integers(0, CLASSES, (-(-size[0] // side), -(-size[1] // side)), np.uint8)
        label = blocks.repeat(side, 0).repeat(side, 1)[: size[0], : size[1]]
        image = label[..., None] * 12 + rng.integers(0, 9, (*size, 3), np.uint8)
        cv2.imwrite(str(root / f"images/{k}.png"), image)
        cv2.imwrite(str(root / f"labels/{k}.png"), label)
    names = [f"class {k}" for k in range(CLASSES)]
    register_sem_seg(NAME, root / "images", root / "labels", names)


@contextmanager
def counting_launches(entry: dict) -> Iterator[None]:
    """Counts the kernels that the block launches, and the time that they keep the device busy."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profile:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    events = profile.key_averages()
    calls = Counter({event.key: event.count for event in events})
    entry["launches"] = sum(n for key, n in calls.items() if "LaunchKernel" in key)
    entry["copies"] = sum(n for key, n in calls.items() if key.startswith("cudaMemcpyAsync"))
    entry["operators"] = sum(n for key, n in calls.items() if key.startswith("aten::"))
    entry["kernel_ms"] = 1e-3 * sum(
        event.self_device_time_total
        for event in events
        if event.device_type == torch.autograd.DeviceType.CUDA
    )


@contextmanager
def counting_waits(entry: dict) -> Iterator[None]:
    """Counts how often the host waits for the device in the block, by the line that waits."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [each for each in caught if "synchroniz" in str(each.message)]
    places = Counter(f"{Path(each.filename).name}:{each.lineno}" for each in waits)
    entry["waits"], entry["waits_at"] = len(waits), dict(places.most_common(12))


def check(ok: bool, what: str, found: str = "") -> dict:
    """Makes a line of the report from a requirement and its result."""
    return {"ok": bool(ok), "what": what, "found": found}


def now(cuda: bool) -> float:
    """Returns the time in seconds, after the device has finished its work."""
    if cuda:
        torch.cuda.synchronize()
    return time.perf_counter()


def mark(cuda: bool) -> object:
    """Marks a point in the device's own time."""
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def intervals(marks: list) -> list[float]:
    """Returns the milliseconds from each mark to the next."""
    pairs = list(zip(marks, marks[1:], strict=False))
    if pairs and isinstance(marks[0], float):
        return [1e3 * (b - a) for a, b in pairs]
    return [a.elapsed_time(b) for a, b in pairs]


def reset_peak(cuda: bool) -> None:
    """Resets the peak memory."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()


def peak_gib(cuda: bool) -> float | None:
    """Returns the peak memory of the device's tensors; None on a CPU."""
    return torch.cuda.max_memory_allocated() / GIB if cuda else None


def release() -> None:
    """Frees unused memory."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
