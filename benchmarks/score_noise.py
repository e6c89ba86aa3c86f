#!/usr/bin/env python
"""Measures whether DRF selects better if a change within its standard error does not count.

    python -m fishertune_d2.bench table1 --profile camvid --methods freeze --seeds 43
    python benchmarks/score_noise.py measure --seed 43 \
      --warmup outputs/bench/camvid/dinov2_vits/shared/warmup_43_*.pth
    python benchmarks/score_noise.py compare      # all seeds that were measured
    python benchmarks/fisher_tables.py            # the tables of docs/results/fisher.md

``measure`` needs CamVid in $DETECTRON2_DATASETS. It keeps the sums of each part of each half of the
images, so you can stop it and start it again. ``compare`` writes outputs/fisher/score_noise.json.

    python benchmarks/score_noise.py estimate --seed 43 --warmup FILE --z 1 --file FILE

``estimate`` writes what a training with that seed would estimate, with the change shrunk, as a file
for FISHER.ESTIMATE.
"""

import argparse
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fisher import SHARE  # noqa: E402 - the package need not be installed
from paired_sums import PairedSums, Scores, gather, load, save  # noqa: E402
from selection_stability import BATCH, HALVES, RHOS, after_warmup, register_half  # noqa: E402

from fishertune_d2.fisher import (  # noqa: E402
    UNITS,
    FisherEstimate,
    Units,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
)
from fishertune_d2.version import commit  # noqa: E402

# A half is measured in parts, which end at these numbers of images.
MARKS = (32, 64, 128, 320)
ZS = (0.0, 0.5, 1.0, 2.0)  # standard errors
# Further values of rho, with z 0, that show how much a larger rho alone gives.
MORE_RHOS = (0.03, 0.3, 3.0)
# Of single weights every seventh is compared, which changes an overlap by up to 0.004.
SAMPLED = 7


def part_file(output: Path, seed: int, half: int, images: int) -> Path:
    """The file of the part of a half that ends at a number of images."""
    return output / "score_noise" / f"{seed}_{half}_{images}.safetensors"


def measure(output: Path, warmup: Path, seed: int, images: int) -> None:
    """Gathers the sums of both halves, part by part, up to a number of images."""
    setting = after_warmup(warmup, seed, output)
    (whole,) = setting.cfg.DATASETS.TRAIN
    names = [register_half(whole, half, seed) for half in HALVES]
    for start, end in zip((0, *MARKS), MARKS, strict=False):
        for half, name in zip(HALVES, names, strict=True):
            path = part_file(output, seed, half, end)
            if end > images or path.is_file():
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            setting.cfg.defrost()
            setting.cfg.DATASETS.TRAIN = (name,)
            # Draws of Eq. 6 of its own, because they are a part of the noise.
            own_seed = zlib.crc32(f"{seed}/{half}/{end}".encode())
            gathered, _ = gather(
                setting.batches(end - start, skip=start),
                lambda batches, making, own=own_seed: setting.estimate(batches, making, seed=own),
            )
            save(path, gathered, base=setting.base)
            print(f"{path.name}: images {start} to {end}", flush=True)


def shrunk(estimate: FisherEstimate, errors: Scores, z: float) -> FisherEstimate:
    """Lets F(x') come nearer to F(x) by z standard errors of the change, and no further.

    F(x') becomes F(x) + sign(d) * max(|d| - z * SE(d), 0), with d = F(x') - F(x).

    Args:
        estimate: F(x) and F(x').
        errors: the standard errors of the change, by name.
        z: the number of standard errors; 0 leaves F(x') as it is.

    Returns:
        The estimate with the new F(x').
    """
    shifted = {}
    for name, f in estimate.f.items():
        change = estimate.shifted[name] - f
        less = torch.minimum(change.abs(), z * errors[name])
        shifted[name] = estimate.shifted[name] - change.sign() * less
    return replace(estimate, shifted={name: s.clamp_min(0.0) for name, s in shifted.items()})


def signal_to_noise(estimate: FisherEstimate, errors: Scores) -> dict[str, Tensor]:
    """The change of F in standard errors, |d| / SE(d); 0 where nothing changes."""
    changes = {name: (estimate.shifted[name] - f).abs() for name, f in estimate.f.items()}
    return {
        name: torch.where(errors[name] > 0, change / errors[name], 0.0)
        for name, change in changes.items()
    }


def all_scores(sums: PairedSums) -> Iterator[tuple[tuple, Tensor]]:
    """Yields the scores that are compared: their name, rho and z, and the score of each unit."""
    estimate, errors = sums.estimate(), sums.standard_errors()
    yield ("F", None, None), estimate.f["all"]
    yield ("signal to noise", None, None), signal_to_noise(estimate, errors)["all"]
    for z in ZS:
        nearer = shrunk(estimate, errors, z)
        for rho in sorted((*RHOS, *(MORE_RHOS if z == 0 else ()))):
            yield ("DRF", rho, z), domain_related_fisher(nearer, rho=rho)["all"]


@dataclass
class Ranked:
    """The units that a selection ranks.

    Attributes:
        sizes: the number of weights of each unit, (n,).
        weights: the number of weights that a selection holds at most.
    """

    sizes: Tensor
    weights: float

    def best(self, scores: Tensor) -> Tensor:
        """Whether each unit is among the best, (n,)."""
        count = min(len(scores), int(self.weights // int(self.sizes.min())))
        places = scores.topk(count).indices
        chosen = torch.zeros(len(scores), dtype=torch.bool)
        chosen[places[self.sizes[places].cumsum(0) <= self.weights]] = True
        return chosen

    def in_common(self, a: Tensor, b: Tensor) -> float:
        """The share of the weights of the selection ``a`` that ``b`` has too."""
        return int(self.sizes[a & b].sum()) / int(self.sizes[a].sum())


def read_half(
    output: Path, seed: int, half: int, images: int, unit: str
) -> tuple[PairedSums, Ranked]:
    """Reads a half's sums up to a number of images, in one tensor ``"all"`` for each quantity."""
    step, total = SAMPLED if unit == "weight" else 1, PairedSums()
    for mark in MARKS:
        if mark <= images:
            sums, notes = load(part_file(output, seed, half, mark), unit)
            for quantity, values in sums.sums.items():
                flat = torch.cat([value.flatten() for value in values.values()])
                sums.sums[quantity] = {"all": flat[::step].clone()}
            total.join(sums)
    count = len(total.sums["plain"]["all"])
    sizes = torch.ones(count, dtype=torch.int64)
    if unit == "neuron":
        groups = Units(unit, notes["shapes"]).groups.values()
        sizes = torch.cat([torch.full((group.count,), group.size) for group in groups])
    return total, Ranked(sizes, int(SHARE * notes["base"] / step))


def compare_scores(
    pair: list[PairedSums], truths: list[dict[float, Tensor]], ranked: Ranked
) -> Iterator[dict]:
    """Yields the overlaps of each score at one number of images.

    Args:
        pair: the sums of both halves.
        truths: by half the selections by DRF from all of its images, by rho.
        ranked: the units that are selected.

    Yields:
        For each score the overlap of both ``halves``, ``with_f`` of the same images, and
        ``with_truth`` of the other half, by rho; the last two are means over both halves.
    """
    by_f: list[Tensor] = []
    for scores in zip(*map(all_scores, pair), strict=True):
        (name, rho, z), _ = scores[0]
        own = [ranked.best(each) for _, each in scores]
        by_f = by_f or own  # the first score is F
        yield {
            "score": name,
            "rho": rho,
            "z": z,
            "halves": ranked.in_common(*own),
            "with_f": sum(map(ranked.in_common, own, by_f)) / 2,
            "with_truth": {
                str(rho): sum(ranked.in_common(own[i], truths[1 - i][rho]) for i in HALVES) / 2
                for rho in RHOS
            },
        }


def noise(pair: list[PairedSums]) -> dict[str, float]:
    """Describes the standard errors of both halves.

    Returns:
        ``paired``: the median ratio of the standard error of paired differences to that of
        independent ones. ``between``: the median of |d - d*| / sqrt(SE^2 + SE*^2), with d and d* of
        the two halves, which is 0.67 if the errors are right and normal. ``above_z``: the share of
        the changes that are larger than z standard errors.
    """
    found = {"paired": 0.0, **{f"above_{z:g}": 0.0 for z in ZS[1:]}}
    changes, errors = [], []
    for sums in pair:
        estimate = sums.estimate()
        change = estimate.shifted["all"] - estimate.f["all"]
        paired, unpaired = (sums.standard_errors(paired=each)["all"] for each in (True, False))
        some = unpaired > 0
        found["paired"] += float((paired[some] / unpaired[some]).median()) / 2
        for z in ZS[1:]:
            share = (change[some].abs() > z * paired[some]).double().mean()
            found[f"above_{z:g}"] += float(share) / 2
        changes.append(change)
        errors.append(paired)
    both = errors[0].hypot(errors[1])
    found["between"] = float(((changes[0] - changes[1]).abs() / both)[both > 0].median())
    return found


def compare(output: Path) -> None:
    """Compares the halves of every seed that was measured, at each number of images."""
    path = output / "score_noise.json"
    result = {"share": SHARE, "batch": BATCH, "commit": commit(), "rows": [], "noise": []}
    if path.is_file():
        result = json.loads(path.read_text())
    found = sorted((output / "score_noise").glob(f"*_0_{MARKS[0]}.safetensors"))
    for seed in (int(file.name.split("_")[0]) for file in found):
        marks = [
            mark
            for mark in MARKS
            if all(part_file(output, seed, half, mark).is_file() for half in HALVES)
        ]
        for unit in UNITS:
            done = [r["images"] for r in result["noise"] if (r["seed"], r["unit"]) == (seed, unit)]
            if done == marks:
                continue
            rows, noises = compare_seed(output, seed, unit, marks)
            for key, new in (("rows", rows), ("noise", noises)):
                kept = [r for r in result[key] if (r["seed"], r["unit"]) != (seed, unit)]
                result[key] = kept + new
            path.write_text(json.dumps(result, indent=1))


def compare_seed(
    output: Path, seed: int, unit: str, marks: list[int]
) -> tuple[list[dict], list[dict]]:
    """Compares the halves of one seed, with one kind of unit; returns rows and noises."""
    truths = []
    for half in HALVES:
        sums, ranked = read_half(output, seed, half, marks[-1], unit)
        estimate = sums.estimate()
        scores = {rho: domain_related_fisher(estimate, rho=rho)["all"] for rho in RHOS}
        truths.append({rho: ranked.best(score) for rho, score in scores.items()})
    rows, noises = [], []
    for images in marks:
        pair = [read_half(output, seed, half, images, unit)[0] for half in HALVES]
        key = {"seed": seed, "unit": unit, "images": images}
        noises.append({**key, **noise(pair)})
        for row in compare_scores(pair, truths, ranked):
            rows.append({**key, "truth_images": marks[-1], **row})
        print(noises[-1], flush=True)
    return rows, noises


def write_estimate(output: Path, warmup: Path, seed: int, z: float, file: Path) -> None:
    """Writes the estimate of a training of configs/camvid/fishertune.yaml, with a shrunk change."""
    path = output / "score_noise" / f"training_{seed}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file():
        gather_as_training(path, output, warmup, seed)
    sums, notes = load(path, "weight")
    estimate = sums.estimate(notes["shift_weight"])
    estimate.notes = {**notes["of_estimate"], "shrunk_by": f"{z} standard errors"}
    shrunk(estimate, sums.standard_errors(), z).save(file)


def gather_as_training(path: Path, output: Path, warmup: Path, seed: int) -> None:
    """Gathers the sums of the batches that a training's estimate sees, with its notes."""
    from fishertune_d2.config import default_config
    from fishertune_d2.engine import Trainer
    from fishertune_d2.engine.image_losses import SegmentationLoss
    from fishertune_d2.engine.perturbation import build_perturbation
    from fishertune_d2.engine.run_record import NOTE

    cfg = default_config()
    cfg.merge_from_file(str(ROOT / "configs/camvid/fishertune.yaml"))
    options = ["SEED", seed, "TUNING.WARMUP_CHECKPOINT", str(warmup.resolve())]
    cfg.merge_from_list([*options, "OUTPUT_DIR", str(output / "score_noise/training")])
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)

    def as_training(batches: Iterator[list[dict]], making: Callable) -> FisherEstimate:
        return estimate_fisher(
            trainer.segmentor,
            batches,
            SegmentationLoss(),
            find_candidates(trainer.backbone),
            estimator=making,
            perturb=build_perturbation(cfg, trainer.backbone),
            seed=seed,
        )

    gathered, found = gather(trainer._estimation_batches(), as_training)
    record = json.dumps(trainer._run.record.state_dict())
    notes = {**found.notes, "estimator": "diagonal", NOTE: record}
    save(path, gathered, shift_weight=found.shift_weight, of_estimate=notes)


STEPS = ("measure", "compare", "estimate")

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("--warmup", type=Path, help="the checkpoint of a warm-up")
    parser.add_argument("--seed", type=int, default=43, help="the seed of that warm-up")
    parser.add_argument("--images", type=int, default=MARKS[-1], help="the most images of a half")
    parser.add_argument("--z", type=float, default=1.0, help="standard errors, for 'estimate'")
    parser.add_argument("--file", type=Path, help="the file that 'estimate' writes")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/fisher")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if args.step == "measure":
        measure(args.output, args.warmup, args.seed, args.images)
    elif args.step == "compare":
        compare(args.output)
    else:
        write_estimate(args.output, args.warmup, args.seed, args.z, args.file)
