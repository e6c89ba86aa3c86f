#!/usr/bin/env python
"""Measures how much of a selection is the same from two disjoint halves of CamVid's images by day.

    python -m fishertune_d2.bench table1 --profile camvid --methods freeze --seeds 43
    python benchmarks/selection_stability.py --seed 43 \
      --warmup outputs/bench/camvid/dinov2_vits/shared/warmup_43_*.pth
    python benchmarks/fisher_tables.py            # the tables of docs/results/fisher.md

It needs CamVid in $DETECTRON2_DATASETS, and writes outputs/fisher/stability.json. It keeps the
estimates of each half until both halves are compared, so you can stop it and start it again.
"""

import argparse
import json
import shutil
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from both_estimators import keeping_both  # noqa: E402
from fisher import SHARE, SHIFT_WEIGHT, Setting  # noqa: E402 - the package need not be installed

from fishertune_d2.data.metadata import registered_dataset  # noqa: E402
from fishertune_d2.data.registration import register  # noqa: E402
from fishertune_d2.fisher import (  # noqa: E402
    UNITS,
    Diagonal,
    FisherEstimate,
    Natural,
    Selection,
    Smoothed,
    Units,
    Variational,
    domain_related_fisher,
    overlap,
)

MARKS = (16, 32, 64, 128, 320)  # images
BATCH = 4  # images, as in configs/camvid
RHOS = (0.01, 0.1, 1.0)
HALVES = (0, 1)
Read = Callable[..., dict[str, Tensor]]
# A pass over the images: the estimator, and the estimates that it gives. Squares give two.
PASSES: dict[str, tuple[Callable, dict[str, Read]]] = {
    "squares": (Smoothed, {"diagonal": Diagonal.fisher, "smoothed": Smoothed.fisher}),
    "per neuron": (
        partial(Variational, resolution="neuron"),
        {"variational, per neuron": Variational.fisher},
    ),
    "variational": (Variational, {"variational": Variational.fisher}),
    # The usual start, the squares of ten batches, is most of what 64 images give.
    "per neuron at once": (
        partial(Variational, resolution="neuron", start=1),
        {"variational, per neuron, start 1": Variational.fisher},
    ),
    "natural": (Natural, {"natural": Natural.fisher}),
}


def after_warmup(warmup: Path, seed: int, output: Path) -> Setting:
    """Builds the setting of configs/camvid after a warm-up, with crops in batches of ``BATCH``."""
    options = ["TUNING.WARMUP_CHECKPOINT", str(warmup.resolve())]
    options += ["FISHER.IMS_PER_BATCH", BATCH, "SEED", seed]
    return Setting("camvid/fishertune.yaml", options, output)


def register_half(name: str, half: int, seed: int) -> str:
    """Registers a random half of a data set's images; returns its name."""
    whole = registered_dataset(name)
    keep = whole.keep or (lambda stem: True)

    def keeps(stem: str) -> bool:
        return keep(stem) and zlib.crc32(f"{seed}/{stem}".encode()) % 2 == half

    own = f"{name}_half_{half}"
    register(replace(whole, name=own, keep=keeps, published=None))
    return own


def measure(setting: Setting, name: str, half: str, folder: Path) -> None:
    """Estimates F(x) and F(x') from one half, and writes the estimates at each mark."""
    make, reads = PASSES[name]
    setting.cfg.defrost()
    setting.cfg.DATASETS.TRAIN = (half,)
    made, making = keeping_both(make)

    def watching() -> Iterator[list[dict]]:
        images = 0
        for batch in setting.batches(max(MARKS)):
            yield batch
            images += len(batch)
            if images in MARKS:
                for estimator, read in reads.items():
                    f, shifted = (read(each) for each in made)
                    found = FisherEstimate(f, shifted, SHIFT_WEIGHT, images)
                    found.save(folder / f"{estimator}_{images}.safetensors")
                print(f"{name}, {half}: {images} images", flush=True)

    setting.estimate(watching(), making)
    (folder / "done").touch()


def selection(
    setting: Setting, scores: Mapping[str, Tensor], units: Units, allocation: str
) -> Selection:
    """Selects the best 5 % of the backbone's weights, or all that have a score above 0."""
    # Where a learned Lambda fell to the prior's, F is 0, so fewer weights can be selected.
    found = (int((score > 0).sum()) * units.groups[key].size for key, score in scores.items())
    share = min(SHARE, sum(found) / setting.base)
    return Selection.from_scores(scores, share, setting.base, units, allocation)


def in_common(
    setting: Setting,
    pair: Sequence[FisherEstimate],
    allocations: Sequence[str],
    kinds: Sequence[str] = UNITS,
) -> list[dict]:
    """Computes the share of the selection of one estimate that the other one's has too."""
    rows = []
    for unit in kinds:
        units = Units(unit, pair[0].shapes)
        by_unit = [estimate.by_unit(units) for estimate in pair]
        for rho in (None, *RHOS):
            scores = [e.f if rho is None else domain_related_fisher(e, rho=rho) for e in by_unit]
            for allocation in allocations:
                both = overlap(*(selection(setting, each, units, allocation) for each in scores))
                rows.append({"unit": unit, "rho": rho, "allocation": allocation, "overlap": both})
    return rows


def compare(setting: Setting, name: str, folders: list[Path]) -> list[dict]:
    """Compares the estimates of both halves at each mark, one row for each way to select."""
    found: dict[tuple, dict] = {}
    for estimator in PASSES[name][1]:
        allocations = ["global", "layer"] if estimator == "diagonal" else ["global"]
        # All weights of a neuron have one F there.
        kinds = ["neuron"] if "per neuron" in estimator else UNITS
        for images in MARKS:
            files = [folder / f"{estimator}_{images}.safetensors" for folder in folders]
            pair = [FisherEstimate.load(file) for file in files]
            for row in in_common(setting, pair, allocations, kinds):
                both = row.pop("overlap")
                row = {"estimator": estimator, **row}
                row = found.setdefault(tuple(row.values()), {**row, "images": [], "overlap": []})
                row["images"].append(images)
                row["overlap"].append(both)
    return list(found.values())


def stability(output: Path, warmup: Path, seed: int) -> None:
    """Measures all estimators with one seed: of the warm-up, of the halves and of the crops."""
    path = output / "stability.json"
    result = {"share": SHARE, "batch": BATCH, "rows": []}
    if path.is_file():
        result = json.loads(path.read_text())
    setting = after_warmup(warmup, seed, output)
    (whole,) = setting.cfg.DATASETS.TRAIN
    for name, (_, reads) in PASSES.items():
        done = {row["estimator"] for row in result["rows"] if row["seed"] == seed}
        if done >= reads.keys():
            continue
        folders = [output / "stability" / f"{seed}_{name}_{half}" for half in HALVES]
        for half, folder in zip(HALVES, folders, strict=True):
            folder.mkdir(parents=True, exist_ok=True)
            if not (folder / "done").is_file():
                measure(setting, name, register_half(whole, half, seed), folder)
        rows = compare(setting, name, folders)
        result["rows"] += [{"seed": seed, **row} for row in rows]
        path.write_text(json.dumps(result, indent=1))
        for folder in folders:
            shutil.rmtree(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warmup", type=Path, required=True, help="the checkpoint of a warm-up")
    parser.add_argument("--seed", type=int, default=43, help="the seed of that warm-up")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/fisher")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    stability(args.output, args.warmup, args.seed)
