#!/usr/bin/env python
"""Measures time, memory and traffic by processes, backbone, resolution and share.

    python benchmarks/scaling.py                                    # 3 minutes on two CPU cores
    python benchmarks/scaling.py --show docs/results/scaling.json   # the tables again

The benchmark measures DINOv2 with the head of configs/demo.yaml. Each process has one thread and
one image of noise. First one process makes a step alone, then two independent processes make one at
the same time ("apart"), then two processes that train one model ("together"). A time is the median
over rounds in which these take turns. This separates the cost of sharing a machine from the cost of
exchanging gradients. The bytes that the paper's config sends with ViT-S, L and H are computed.

The benchmark needs neither data nor weights. It writes outputs/scaling/scaling.json.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import torch
from detectron2.config import CfgNode
from evaluation import describe_machine
from tabulate import tabulate
from torch import Tensor
from training import ROOT, WAYS, Training, Tune, fishertune

from fishertune_d2.compat import wrap_for_ranks
from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.image_losses import SegmentationLoss
from fishertune_d2.engine.optimizer import is_backbone
from fishertune_d2.engine.scoring import commit
from fishertune_d2.fisher import (
    StatisticsPerturbation,
    count_of_share,
    estimate_fisher,
    find_candidates,
    tuned_share,
)

FISHERTUNE, ESTIMATION = "fishertune", "estimation"
VFMS = ("dinov2_vits", "dinov2_vitl", "mae_vith")  # the backbones whose sent bytes are computed
FORK = multiprocessing.get_context("fork")  # a process starts with everything imported


@dataclass(frozen=True)
class Cell:
    """One measurement of the tables.

    Attributes:
        way: "freeze", "full", :data:`FISHERTUNE` with single weights, or :data:`ESTIMATION`.
        vfm: MODEL.VFM.NAME.
        crop: height and width of the image, in pixels.
        share: the share of the backbone that FisherTune tunes.
    """

    way: str
    vfm: str = "dinov2_vits"
    crop: tuple[int, int] = (126, 210)
    share: float = 0.05

    @property
    def tune(self) -> Tune:
        """Returns the function that attaches what is tuned to a backbone."""
        if self.way == FISHERTUNE:
            return partial(fishertune, "weight", self.share)
        return WAYS[self.way]

    def config(self) -> CfgNode:
        """Returns the demo's config, with one image for each step."""
        options = {
            "MODEL.VFM.NAME": self.vfm,
            "MODEL.VFM.IMG_SIZE": self.crop,
            "INPUT.CROP.SIZE": self.crop,
            "TUNING.D_MAX": self.share,
            "SOLVER.IMS_PER_BATCH": 2 if self.way == ESTIMATION else 1,  # Eq. 6 needs two
        }
        return _config("configs/demo.yaml", options)


CELLS = (
    Cell("freeze"),
    Cell("full"),
    Cell(FISHERTUNE, share=0.01),
    Cell(FISHERTUNE),
    Cell(FISHERTUNE, share=0.2),
    Cell(FISHERTUNE, crop=(84, 140)),
    Cell(FISHERTUNE, crop=(252, 420)),
    Cell("full", vfm="dinov2_vitb"),
    Cell(FISHERTUNE, vfm="dinov2_vitb"),
    Cell(ESTIMATION),
)


class Estimation:
    """Estimates F(x) and F(x') of one batch, and sums them over processes."""

    def __init__(self, cfg: CfgNode):
        training = Training(cfg, WAYS["freeze"])
        self.model, self.batch = training.model, training.batch
        self.candidates = find_candidates(self.model.backbone)

    def step(self) -> None:
        """Runs one estimate."""
        points = self.model.backbone.perturbation_points()
        perturb = StatisticsPerturbation(
            points, num_prefix_tokens=self.model.backbone.num_prefix_tokens
        )
        estimate_fisher(
            self.model,
            [self.batch],
            SegmentationLoss(),
            self.candidates,
            perturb=perturb,
            progress=False,
        )


def _work(cell: Cell, rank: int | None, folder: str, pipe: Connection) -> None:
    """Makes a step on demand and reports its time; in the end, reports the peak of memory."""
    torch.set_num_threads(1)
    before = _memory("VmRSS")
    if rank is not None:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
        )
    cfg = cell.config()
    work = Estimation(cfg) if cell.way == ESTIMATION else Training(cfg, cell.tune)
    if cell.way != ESTIMATION:
        work.model = wrap_for_ranks(work.model)
    # Resets the peak: ranking the weights takes more memory than some steps.
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    while pipe.recv():
        start = time.perf_counter()
        work.step()
        pipe.send(time.perf_counter() - start)
    gradients = {"decoder": 0, "backbone": 0}
    for name, parameter in work.model.named_parameters():
        if parameter.grad is not None:
            part = "backbone" if is_backbone(name.removeprefix("module.")) else "decoder"
            gradients[part] += parameter.grad.nbytes
    pipe.send({"peak": _memory("VmHWM") - before, "gradients": gradients})


def measure(cell: Cell, rounds: int) -> dict:
    """Measures the time of one process, two apart and two together, and the memory."""
    with tempfile.TemporaryDirectory() as folder:
        pipes = {}
        for name, rank in (("first", None), ("second", None), ("rank 0", 0), ("rank 1", 1)):
            pipes[name], other = FORK.Pipe()
            FORK.Process(target=_work, args=(cell, rank, folder, other), daemon=True).start()
            other.close()  # so that the end of the process is noticed
        groups = {
            "alone": [pipes["first"]],
            "apart": [pipes["first"], pipes["second"]],
            "together": [pipes["rank 0"], pipes["rank 1"]],
        }
        seconds: dict[str, list[float]] = {name: [] for name in groups}
        for number in range(rounds + 1):
            for name, group in groups.items():
                for pipe in group:
                    pipe.send(True)
                taken = [pipe.recv() for pipe in group]
                if number > 0:  # the first round warms up
                    seconds[name].append(max(taken))
        for pipe in pipes.values():
            pipe.send(False)
        last = {name: pipe.recv() for name, pipe in pipes.items()}
    return {
        **asdict(cell),
        "seconds": {name: median(values) for name, values in seconds.items()},
        "peak_bytes": {"alone": last["first"]["peak"], "together": last["rank 0"]["peak"]},
        "gradient_bytes": last["rank 0"]["gradients"],
    }


def sent(vfm: str) -> dict:
    """Computes the bytes that a process sends to each sum over processes, in the paper's config."""
    cfg = _config("configs/fishertune_dinov2.yaml", {"MODEL.VFM.NAME": vfm, "MODEL.DEVICE": "meta"})
    with torch.device("meta"):
        model = Trainer.build_model(cfg)
    tuning = cfg.TUNING
    share = tuned_share(1.0, tuning.D_MIN, tuning.D_MAX, schedule=tuning.SCHEDULE)
    base = sum(p.numel() for p in model.backbone.parameters())
    decoder = [p for name, p in model.named_parameters() if not is_backbone(name)]
    unused = model.backbone.unused_parameters()
    trained = [p for name, p in model.backbone.named_parameters() if name not in unused]
    measured = {c.name: c.parameter for c in find_candidates(model.backbone)}
    classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    return {
        "vfm": vfm,
        "decoder": _bytes(decoder),
        "full": _bytes(trained),
        "fishertune": 4 * count_of_share(share, base),
        "fisher": 2 * _bytes(measured.values()),  # F(x) and F(x')
        "weights": _bytes(model.state_dict().values()),
        "confusion": 8 * classes * (classes + 1),
    }


def tables(result: dict) -> str:
    """Formats the tables of docs/scaling.md."""
    times, memory = [], []
    for cell in result["cells"]:
        name = [cell["way"], cell["vfm"], "{} x {}".format(*cell["crop"])]
        name.append(f"{100 * cell['share']:.0f} %" if cell["way"] == "fishertune" else "-")
        alone, apart, together = (cell["seconds"][k] for k in ("alone", "apart", "together"))
        ratios = (apart / alone, together / apart, 2 * alone / together)
        times.append([*name, f"{alone:.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
        sizes = (*cell["peak_bytes"].values(), *cell["gradient_bytes"].values())
        if cell["way"] != ESTIMATION:
            memory.append([*name, *(f"{size / 1e6:,.1f}" for size in sizes)])
    bytes_sent = []
    for vfm in result["sent"]:
        full, fishertune = (vfm["decoder"] + vfm[way] for way in ("full", "fishertune"))
        sizes = (vfm[k] for k in ("decoder", "full", "fishertune", "fisher", "weights"))
        bytes_sent.append(
            [vfm["vfm"], *(f"{size / 1e6:,.1f}" for size in sizes)]
            + [f"{fishertune / full:.2f}", f"{_seconds(full):.2f}", f"{_seconds(fishertune):.2f}"]
        )
    measured = ["way", "VFM", "image", "share"]
    heads = (
        [*measured, "alone, s", "apart / alone", "together / apart", "speed-up"],
        [*measured, "peak alone, MB", "together, MB", "decoder sent, MB", "backbone sent, MB"],
        ["VFM", "decoder", "full", "FisherTune", "F(x), F(x')", "weights"]
        + ["with decoder, ratio", "full, s", "FisherTune, s"],
    )
    return "\n\n".join(
        tabulate(lines, head, tablefmt="github", disable_numparse=True)
        for lines, head in zip((times, memory, bytes_sent), heads, strict=True)
    )


def _seconds(size: int, processes: int = 8, bytes_per_second: float = 10e9 / 8) -> float:
    """Computes the seconds that a ring needs to sum ``size`` bytes at 10 Gbit/s."""
    return 2 * (processes - 1) / processes * size / bytes_per_second


def _config(path: str, options: dict) -> CfgNode:
    cfg = default_config()
    cfg.merge_from_file(str(ROOT / path))
    for key, value in {**options, "MODEL.VFM.WEIGHTS": "random"}.items():
        cfg.merge_from_list([key, value])
    return cfg


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def _memory(field: str) -> int:
    (kilobytes,) = re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kilobytes) * 1024


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/scaling/scaling.json")
    parser.add_argument("--show", type=Path, help="prints the tables of a file, measures nothing")
    args = parser.parse_args()
    if args.show:
        print(tables(json.loads(args.show.read_text())))
        sys.exit()
    torch.set_num_threads(1)
    begin, cells = time.time(), []
    for cell in CELLS:
        print(cell, file=sys.stderr, flush=True)
        cells.append(measure(cell, args.rounds))
    result = {
        "machine": describe_machine(),
        "load": os.getloadavg()[2],  # over the last 15 minutes; this benchmark adds 2
        "commit": commit(),
        "rounds": args.rounds,
        "cells": cells,
        "sent": [sent(vfm) for vfm in VFMS],
        "seconds": time.time() - begin,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
