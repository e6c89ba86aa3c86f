#!/usr/bin/env python
"""Measures how accurate and how fast each estimator of F is, with real DINOv2 weights on CamVid.

    python train_net.py --config-file configs/camvid/freeze.yaml     # trains the decoder
    python benchmarks/fisher.py convergence       # 40 minutes on two CPU cores
    python benchmarks/fisher.py shift             # 5 minutes
    python benchmarks/fisher.py cost              # 5 minutes
    python benchmarks/fisher.py ranking           # 1 minute
    python benchmarks/fisher.py steps             # 10 minutes
    python benchmarks/fisher_tables.py            # the tables of docs/results/fisher.md

Each step writes a JSON file to outputs/fisher. ``convergence`` and ``steps`` keep what they have
measured, so you can stop them and start them again. ``convergence``, ``shift`` and ``cost`` need
CamVid in $DETECTRON2_DATASETS; ``steps`` needs the model that docs/results/fisher.md names.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median

import numpy as np
import scipy.stats
import timm
import torch
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from both_estimators import keeping_both  # noqa: E402

from fishertune_d2.fisher import (  # noqa: E402 - the package need not be installed
    ESTIMATORS,
    KINDS,
    FisherEstimate,
    Selection,
    StatisticsPerturbation,
    Variational,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
    overlap,
    relative_change,
)
from fishertune_d2.fisher.estimators import diagonal  # noqa: E402
from fishertune_d2.fisher.estimators.linear_calls import LinearCalls  # noqa: E402

BATCH = 8  # images
REFERENCE_IMAGES = 320
MARKS = (8, 16, 32, 64, 80, 128, 192, 256, 320)
HALF = 64  # images in each of two halves of the data
STRENGTHS = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)
SHARE = 0.05
# E[exp(-(|a| + |b|))] of two standard normal numbers. Every mark uses it.
SHIFT_WEIGHT = float((2 * np.exp(0.5) * scipy.stats.norm.cdf(-1)) ** 2)
# The estimator and the number of images of each curve: that of the reference, or a fifth of it.
CURVES: dict[str, tuple[Callable, int]] = {
    "diagonal": (ESTIMATORS["diagonal"], REFERENCE_IMAGES),
    "smoothed": (ESTIMATORS["smoothed"], REFERENCE_IMAGES),
    "closed_form": (ESTIMATORS["closed_form"], HALF),
    "natural": (ESTIMATORS["natural"], HALF),
    "variational": (ESTIMATORS["variational"], HALF),
    "pathwise": (ESTIMATORS["pathwise"], HALF),
    "variational, per row": (partial(Variational, resolution="row"), HALF),
}


# The default T2, 500 batches of two images, on a model so small that this takes minutes.
STEPS_IMAGES = 1000
STEPS_MARKS = (20, 100, 200, 500, STEPS_IMAGES)
STEPS_ESTIMATORS = ("diagonal", "variational", "pathwise")


class Setting:
    """Holds a model, its loss, and streams of batches of the training images.

    Args:
        config: the config, below configs/.
        options: keys and values in turn, which name the model's weights.
        output: where the trainer may write.
    """

    def __init__(self, config: str, options: Sequence, output: Path):

        from fishertune_d2.config import default_config
        from fishertune_d2.engine import Trainer
        from fishertune_d2.engine.image_losses import SegmentationLoss

        cfg = default_config()
        cfg.merge_from_file(str(ROOT / "configs" / config))
        # "full", because the peak of a full training step is measured too.
        cfg.merge_from_list([*options, "OUTPUT_DIR", str(output), "TUNING.METHOD", "full"])
        self.cfg, self.trainer = cfg, Trainer(cfg)
        self.trainer.resume_or_load(resume=False)
        self.trainer.start_stage("tuning")
        self.model = self.trainer.segmentor
        self.backbone = self.model.backbone
        self.candidates = find_candidates(self.backbone)
        self.loss_fn = SegmentationLoss()
        self.base = sum(p.numel() for p in self.backbone.parameters())

    def batches(self, images: int, skip: int = 0) -> Iterator[list[dict]]:
        """Returns ``images`` random crops of an infinite stream, after the first ``skip`` crops."""
        stream = self.trainer._estimation_batches
        self.cfg.defrost()
        batch = self.cfg.FISHER.IMS_PER_BATCH
        self.cfg.FISHER.BATCHES = (skip + images) // batch
        return islice(stream(), skip // batch, None)

    def estimate(self, batches, estimator, strength: float = 1.0, seed: int = 0) -> FisherEstimate:
        """Estimates F(x) and F(x')."""
        perturb = StatisticsPerturbation(
            self.backbone.perturbation_points(),
            num_prefix_tokens=self.backbone.num_prefix_tokens,
            strength=strength,
        )
        return estimate_fisher(
            self.model,
            batches,
            self.loss_fn,
            self.candidates,
            estimator=estimator,
            perturb=perturb,
            seed=seed,
        )

    def selection(self, scores: dict[str, Tensor]) -> Selection:
        """Selects the best 5 % of the backbone's weights."""
        # Where a learned Lambda fell to the prior's, F is 0, so fewer weights can be selected.
        positive = sum(int((score > 0).sum()) for score in scores.values())
        return Selection.from_scores(scores, min(SHARE, positive / self.base), self.base)


def drf(estimate: FisherEstimate) -> dict[str, Tensor]:
    """Computes DRF in its default form."""
    return domain_related_fisher(estimate)


def sampled_values(scores: dict[str, Tensor], count: int = 200_000) -> np.ndarray:
    """Samples entries at fixed places, enough for three digits of a rank correlation."""
    flat = torch.cat([score.flatten() for score in scores.values()])
    places = torch.randint(len(flat), (count,), generator=torch.Generator().manual_seed(0))
    return flat[places].numpy()


def agreement(setting: Setting, a: FisherEstimate, b: FisherEstimate) -> dict[str, float]:
    """Computes the rank correlation and the overlap of the best 5 %, of F and of DRF."""
    result = {}
    for prefix, scores in (("", (a.f, b.f)), ("drf_", (drf(a), drf(b)))):
        values = [sampled_values(score) for score in scores]
        result[f"{prefix}spearman"] = float(scipy.stats.spearmanr(*values).statistic)
        selections = [setting.selection(score) for score in scores]
        result[f"{prefix}overlap"] = overlap(*selections)
    return result


def watched(
    setting: Setting, make: Callable, batches, marks: Sequence[int]
) -> list[tuple[int, float, FisherEstimate]]:
    """Runs an estimator over batches; returns images, seconds and the estimate at each mark."""
    seen = []
    made, making = keeping_both(make)

    def watching():
        images, seconds = 0, 0.0
        for batch in batches:
            start = time.perf_counter()
            yield batch
            seconds += time.perf_counter() - start  # excludes loading and the comparison
            images += len(batch)
            if images in marks:
                estimate = FisherEstimate(made[0].fisher(), made[1].fisher(), SHIFT_WEIGHT, images)
                seen.append((images, seconds, estimate))

    setting.estimate(watching(), making)
    return seen


def convergence(setting: Setting, output: Path) -> None:
    """Compares each estimator with the plain loop over other images, and two halves of the data."""
    path = output / "convergence.json"
    result = json.loads(path.read_text()) if path.is_file() else {"curves": [], "halves": {}}
    reference_file = output / "reference.safetensors"
    if not reference_file.is_file():
        stream = setting.batches(REFERENCE_IMAGES)
        ((images, seconds, reference),) = watched(
            setting, ESTIMATORS["diagonal_loop"], stream, [REFERENCE_IMAGES]
        )
        reference.save(reference_file)
        result["reference"] = {"images": images, "seconds_per_image": seconds / images}
        path.write_text(json.dumps(result, indent=1))
    reference = FisherEstimate.load(reference_file)
    done = {curve["estimator"] for curve in result["curves"]}
    for name, (make, images) in CURVES.items():
        if name in done:
            continue
        stream = setting.batches(images, skip=REFERENCE_IMAGES)
        seen = watched(setting, make, stream, MARKS)
        curve = agreement_curve(setting, reference, seen)
        first = next(estimate for count, _, estimate in seen if count == HALF)
        stream = setting.batches(HALF, skip=REFERENCE_IMAGES + images)
        ((_, _, second),) = watched(setting, make, stream, [HALF])
        result["curves"].append({"estimator": name, **curve})
        result["halves"][name] = {**agreement(setting, first, second), "images": HALF}
        path.write_text(json.dumps(result, indent=1))
        print(name, result["halves"][name], flush=True)


def agreement_curve(setting: Setting, reference: FisherEstimate, seen: list) -> dict[str, list]:
    """Compares the estimates of :func:`watched` with the reference."""
    curve: dict[str, list] = {"images": [], "seconds": []}
    for images, seconds, estimate in seen:
        curve["images"].append(images)
        curve["seconds"].append(seconds)
        for key, value in agreement(setting, reference, estimate).items():
            curve.setdefault(key, []).append(value)
    return curve


def steps(setting: Setting, output: Path) -> None:
    """Compares 500 steps of the variational estimators with squares over as many other batches."""
    path, reference_file = output / "steps.json", output / "steps_reference.safetensors"
    result = json.loads(path.read_text()) if path.is_file() else {"curves": []}
    if not reference_file.is_file():
        setting.estimate(setting.batches(STEPS_IMAGES), "diagonal").save(reference_file)
    reference = FisherEstimate.load(reference_file)
    done = {curve["estimator"] for curve in result["curves"]}
    for name in STEPS_ESTIMATORS:
        if name in done:
            continue
        stream = setting.batches(STEPS_IMAGES, skip=STEPS_IMAGES)
        seen = watched(setting, ESTIMATORS[name], stream, STEPS_MARKS)
        curve = agreement_curve(setting, reference, seen)
        result["curves"].append({"estimator": name, **curve})
        path.write_text(json.dumps(result, indent=1))
        print(name, {key: values[-1] for key, values in curve.items()}, flush=True)


def shift(setting: Setting, output: Path) -> None:
    """Measures F and DRF as the simulated shift grows (Fig. 4)."""
    images = 32
    keys = ("fisher", "drf", "overlap_fisher", "overlap_change")
    result: dict = {"images": images, "seed": 0, "strengths": list(STRENGTHS)}
    result |= {key: [] for key in keys} | {"kinds": {kind: [] for kind in KINDS}}

    def total(scores: dict[str, Tensor]) -> float:
        return sum(s.sum(dtype=torch.float64).item() for s in scores.values())

    for strength in STRENGTHS:
        estimate = setting.estimate(setting.batches(images), "diagonal", strength)
        scores, change = drf(estimate), relative_change(estimate.f, estimate.shifted, 1e-8)
        selection = setting.selection(scores)
        result["fisher"].append(total(estimate.shifted) / total(estimate.f))
        result["drf"].append(total(scores) / total(estimate.f))
        result["overlap_fisher"].append(overlap(selection, setting.selection(estimate.f)))
        # Without a shift dF is 0 everywhere and selects nothing.
        alone = overlap(selection, setting.selection(change)) if strength else None
        result["overlap_change"].append(alone)
        counts = selection.summary()
        for kind in KINDS:
            part = sum(count for (k, _), count in counts.items() if k == kind)
            result["kinds"][kind].append(part / sum(counts.values()))
        print(strength, result["drf"][-1], flush=True)
    (output / "shift.json").write_text(json.dumps(result, indent=1))


def cost(setting: Setting, output: Path, warmup: Path) -> None:
    """Splits the time of a batch and measures peak memory, as ratios to the plain loop."""
    batch = next(setting.batches(BATCH))
    model, candidates = setting.model, setting.candidates

    def forward():
        with torch.no_grad():
            setting.loss_fn(model, batch).sum()

    def backward():  # the passes of an estimate, without the squares
        parameters = {c.name: c.parameter for c in candidates}
        anchor = torch.zeros((), requires_grad=True)

        def run(call):
            return F.linear(call.x, call.weight, call.bias) + anchor

        with LinearCalls(parameters, run):
            losses = setting.loss_fn(model, batch)
        torch.autograd.grad(losses.sum(), anchor)

    def estimator(name, **options):
        return lambda: estimate_fisher(
            model, [batch], setting.loss_fn, candidates, estimator=name, progress=False, **options
        )

    ways = {
        "forward pass": forward,
        "forward and backward pass": backward,
        "diagonal": estimator("diagonal"),
        "diagonal_loop": estimator("diagonal_loop"),
        "smoothed": estimator("smoothed"),
        "closed_form": estimator("closed_form"),
        "natural": estimator("natural"),
        "variational": estimator("variational"),
        "pathwise": estimator("pathwise"),
        "diagonal, bfloat16": estimator("diagonal", autocast=torch.bfloat16),
        "diagonal, sampled labels": estimator("diagonal", labels="sampled"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(4):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    result: dict = {
        "batch": BATCH,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "seconds": {
            name: median(values[1:]) for name, values in seconds.items()
        },  # the first warms up
        "arithmetic": {name: arithmetic(name, size) for name, size in ARITHMETIC.items()},
    }
    peaks = {}
    for name in ("nothing", "training step", "diagonal", "diagonal_loop", "natural", "variational"):
        command = [sys.executable, __file__, "peak", "--way", name, "--warmup", str(warmup)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        peaks[name] = int(text.split()[-1])
        print(name, peaks[name], flush=True)
    result["peak_bytes"] = peaks
    (output / "cost.json").write_text(json.dumps(result, indent=1))


def peak(setting: Setting, way: str) -> None:
    """Runs one method in this process, and prints the process's peak memory in bytes."""
    batch = next(setting.batches(BATCH))
    if way == "training step":
        losses = setting.loss_fn(setting.model, batch)
        torch.autograd.grad(losses.sum(), list({c.parameter for c in setting.candidates}))
    elif way != "nothing":
        estimate_fisher(setting.model, [batch], setting.loss_fn, setting.candidates, estimator=way)
    print(peak_memory())


def peak_memory() -> int:
    """Returns this process's peak memory in bytes; ru_maxrss would include the parent's."""
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


ARITHMETIC = {
    "vit_small_patch14_dinov2": (210, 280, 14),
    "vit_large_patch14_dinov2": (512, 512, 16),
    "vit_huge_patch14_224": (512, 512, 16),
}


def arithmetic(name: str, size: tuple[int, int, int]) -> dict[str, int]:
    """Computes the memory of the batched diagonal for a batch of 4, on the meta device."""
    height, width, patch = size
    inputs: dict[int, Tensor] = {}

    def run(call):
        inputs[id(call.x)] = call.x  # separate projections share one input
        return F.linear(call.x, call.weight, call.bias)

    with torch.device("meta"):
        vit = timm.create_model(name, num_classes=0, img_size=(height, width), patch_size=patch)
        candidates = find_candidates(vit)
        with LinearCalls({c.name: c.parameter for c in candidates}, run):
            vit.forward_features(torch.empty(4, 3, height, width))
    weights = sum(c.numel for c in candidates)
    largest = max(c.parameter.numel() for c in candidates)
    tokens = next(iter(inputs.values())).shape[1]
    return {
        "batch": 4,
        "tokens": tokens,
        "candidates": weights,
        "bytes_sums": 2 * 4 * weights,
        "bytes_inputs": sum(4 * x.numel() for x in inputs.values()),
        "bytes_products": max(diagonal.CHUNK_BYTES, 4 * largest),
        "flops_products_per_image": 2 * tokens * weights,
    }


def ranking(output: Path) -> None:
    """Ranks as many scores as ViT-L has candidates; measures the time and the additional memory."""
    torch.manual_seed(0)
    count, base = 277_020_672, 304_198_656
    scores = {str(i): torch.rand(count // 24).pow_(8) for i in range(24)}
    before = peak_memory()
    start = time.perf_counter()
    selection = Selection.from_scores(scores, SHARE, base)
    seconds = time.perf_counter() - start
    after = peak_memory()
    result = {
        "scores": count,
        "selected": sum(len(places) for places in selection.indices.values()),
        "seconds": seconds,
        "bytes_scores": 4 * count,
        "bytes_beside": after - before,
    }
    (output / "ranking.json").write_text(json.dumps(result, indent=1))
    print(result)


STEPS = ("convergence", "steps", "shift", "cost", "ranking")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=[*STEPS, "peak"])
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/fisher")
    parser.add_argument(
        "--warmup", type=Path, default=ROOT / "outputs/camvid/freeze/model_warmup.pth"
    )
    parser.add_argument(
        "--small",
        type=Path,
        default=ROOT / "outputs/fisher/small/model_final.pth",
        help="the model that the step 'steps' measures",
    )
    parser.add_argument("--way", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.step == "ranking":
        ranking(args.output)
    elif args.step == "steps":
        options = ["MODEL.WEIGHTS", str(args.small.resolve()), "TUNING.WARMUP_ITERS", 0]
        steps(Setting("quick_schedules/full.yaml", options, args.output), args.output)
    else:
        options = ["TUNING.WARMUP_CHECKPOINT", str(args.warmup.resolve())]
        options += ["FISHER.IMS_PER_BATCH", BATCH]
        setting = Setting("camvid/fishertune.yaml", options, args.output)
        if args.step == "cost":
            cost(setting, args.output, args.warmup.resolve())
        elif args.step == "peak":
            peak(setting, args.way)
        else:
            {"convergence": convergence, "shift": shift}[args.step](setting, args.output)
