#!/usr/bin/env python
"""Compares the weights that simulated shifts select with those that the real shift to dusk selects.

    python -m fishertune_d2.bench table1 --profile camvid --methods freeze --seeds 43 44
    for seed in 43 44; do
      python benchmarks/real_shift.py --seed $seed \
        --warmup outputs/bench/camvid/dinov2_vits/shared/warmup_${seed}_*.pth
    done
    python benchmarks/fisher_tables.py            # the tables of docs/results/fisher.md

It needs CamVid in $DETECTRON2_DATASETS, and writes outputs/fisher/real_shift.json. It keeps F of
each domain in outputs/fisher/real_shift (78 MB each), so you can stop it and start it again. With
--domains it measures and compares only these, and a later start can add others. With
--save-estimates FOLDER it writes files for FISHER.ESTIMATE and compares nothing.
"""

import argparse
import json
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import scipy.stats
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from fisher import SHARE, SHIFT_WEIGHT, Setting, sampled_values  # noqa: E402 - see fisher.py
from selection_stability import BATCH, RHOS, after_warmup, register_half, selection  # noqa: E402

from fishertune_d2.config import changed  # noqa: E402
from fishertune_d2.data.metadata import registered_dataset  # noqa: E402
from fishertune_d2.data.registration import register  # noqa: E402
from fishertune_d2.engine.perturbation import build_perturbation  # noqa: E402
from fishertune_d2.engine.run_keys import defining_keys  # noqa: E402
from fishertune_d2.engine.run_record import NOTE  # noqa: E402
from fishertune_d2.fisher import (  # noqa: E402
    UNITS,
    Diagonal,
    FisherEstimate,
    Selection,
    Units,
    domain_related_fisher,
    estimate_fisher,
    overlap,
    relative_change,
)
from fishertune_d2.fisher.score import mean_over_candidates  # noqa: E402
from fishertune_d2.version import commit  # noqa: E402

IMAGES = 96  # random crops, as the training of configs/camvid measures
DUSK = "camvid_dusk_dev"
STRENGTHS = (0.25, 0.5, 1.0, 2.0)
PHOTOMETRIC = ("night", "fog")
# The score, and rho of its damping.
SCORES = [("dF", 0.01), ("dF", 0.1), *(("DRF", rho) for rho in RHOS)]


@dataclass(frozen=True)
class Domain:
    """The images that one F is measured on.

    Attributes:
        dataset: its name; "" for the training set of the config.
        part: which crops of the stream: the first IMAGES, the second ones, ...
        half: a half of the data set's images; None for all.
        shift: a photometric shift of the images; "" for none.
        strength: of Eq. 6; 0 for none.
    """

    dataset: str = ""
    part: int = 0
    half: int | None = None
    shift: str = ""
    strength: float = 0.0


# The three parts of the day fit into one epoch, so they share no image. All domains with part 0 of
# the day have the same crops.
DOMAINS: dict[str, Domain] = {
    "day": Domain(),
    "dusk": Domain(DUSK),
    **{shift: Domain(shift=shift) for shift in PHOTOMETRIC},
    "other day": Domain(part=1),
    "dusk, half 0": Domain(DUSK, half=0),
    "dusk, half 1": Domain(DUSK, half=1),
    **{f"Eq. 6, {strength:g}": Domain(strength=strength) for strength in STRENGTHS},
    "third day": Domain(part=2),
}


class ShiftedAlone(Diagonal):
    """Measures F(x') with the random numbers of a training, and leaves F(x) out."""

    def update(self, losses) -> None:
        """Adds a batch of x', but none of x."""
        if losses.perturb is not None:
            super().update(losses)

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name; nothing where only x was seen."""
        return super().fisher() if self.images else {}


def dataset_of(domain: Domain, whole: str, seed: int) -> str:
    """Registers a domain's data set where it needs one of its own; returns its name."""
    name = domain.dataset or whole
    if domain.shift:
        shifted = f"{name}_{domain.shift}"
        register(
            replace(registered_dataset(name), name=shifted, shift=domain.shift, published=None)
        )
        return shifted
    return name if domain.half is None else register_half(name, domain.half, seed)


def measure(setting: Setting, domain: Domain) -> FisherEstimate:
    """Measures F on one domain, as its F(x)."""
    cfg = setting.cfg
    whole = cfg.DATASETS.TRAIN
    cfg.defrost()
    cfg.DATASETS.TRAIN = (dataset_of(domain, *whole, cfg.SEED),)
    estimator, perturb = "diagonal", None
    if domain.strength:
        strong = changed(cfg, ["FISHER.PERTURB.STRENGTH", domain.strength])
        estimator, perturb = ShiftedAlone, build_perturbation(strong, setting.backbone)
    try:
        estimate = estimate_fisher(
            setting.model,
            setting.batches(IMAGES, skip=domain.part * IMAGES),
            setting.loss_fn,
            setting.candidates,
            estimator=estimator,
            perturb=perturb,
            seed=cfg.SEED,
        )
    finally:
        cfg.DATASETS.TRAIN = whole
    return FisherEstimate(estimate.shifted or estimate.f, {}, 1.0, estimate.images)


def measured(setting: Setting, names: Sequence[str], folder: Path) -> dict[str, dict[str, Tensor]]:
    """Returns F of each domain by name, measured or from the files of an earlier start."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name in names:
        file = folder / f"{name}.safetensors"
        if not file.is_file():
            measure(setting, DOMAINS[name]).save(file)
            print(f"seed {setting.cfg.SEED}: measured F on {name}", flush=True)
        found[name] = FisherEstimate.load(file).f
    return found


Pair = tuple[str, str]  # the domains of x and x'
Ranked = tuple[Selection, np.ndarray]  # and a sample of the scores


def cases(measured: Collection[str]) -> Iterator[tuple[str, str, Pair, Pair]]:
    """Yields whose x the real shift has, a name, the real shift, and the shift to compare.

    Only pairs of measured domains are compared.

    A training compares x' with one F(x), and its noise is then in the real shift's dF too. With an
    F(x) from other images, only the two shifts can be alike.
    """
    for x, real_x, no_shift in (("same", "day", "other day"), ("other", "other day", "third day")):
        pairs = {
            **{f"Eq. 6, {s:g}": ("dusk", f"Eq. 6, {s:g}") for s in STRENGTHS},
            **{name: ("dusk", name) for name in PHOTOMETRIC},
            "no shift": ("dusk", no_shift),
            "real, other half": ("dusk, half 1", "dusk, half 0"),
        }
        for name, (real, shifted) in pairs.items():
            if {real_x, real, shifted} <= set(measured):
                yield x, name, (real_x, real), ("day", shifted)


def shift_scores(
    x: Mapping[str, Tensor], shifted: Mapping[str, Tensor], score: str, rho: float
) -> dict[str, Tensor]:
    """Computes DRF in the form ``balanced``, or its dF alone (Eq. 5, damped by rho * mean F)."""
    if score == "dF":
        return relative_change(x, shifted, rho * mean_over_candidates(x))
    # One weight for all shifts, as only Eq. 6 has one of its own.
    return domain_related_fisher(FisherEstimate(x, shifted, SHIFT_WEIGHT, IMAGES), rho=rho)


def ranked(setting: Setting, scores: Mapping[str, Tensor], units: Units) -> Ranked:
    """Selects the best 5 % by a score, and samples the score for a rank correlation."""
    return selection(setting, scores, units, "global"), sampled_values(scores)


def compare(setting: Setting, f: Mapping[str, Mapping[str, Tensor]]) -> list[dict]:
    """Compares what each shift selects with what the real shift selects, one row for each."""
    rows = []
    generator = torch.Generator().manual_seed(setting.cfg.SEED)
    for unit in UNITS:
        units = Units(unit, {name: tuple(value.shape) for name, value in f["day"].items()})
        means = {name: units.mean(each) for name, each in f.items()}
        day = means["day"]
        chance = {name: torch.rand(each.shape, generator=generator) for name, each in day.items()}
        alone = {"F alone": ranked(setting, day, units), "random": ranked(setting, chance, units)}
        for score, rho in SCORES:
            for row in compare_by(setting, means, units, alone, score, rho):
                rows.append({"unit": unit, "score": score, "rho": rho, **row})
            print(f"compared the {unit}s by {score}, rho {rho}", flush=True)
    return rows


def compare_by(
    setting: Setting,
    means: Mapping[str, Mapping[str, Tensor]],
    units: Units,
    alone: Mapping[str, Ranked],
    score: str,
    rho: float,
) -> list[dict]:
    """Compares the shifts by one score, and with them what needs no shift, ``alone``."""

    @cache
    def of_shift(x: str, shifted: str) -> Ranked:
        return ranked(setting, shift_scores(means[x], means[shifted], score, rho), units)

    found = [(x, k, of_shift(*real), of_shift(*pair)) for x, k, real, pair in cases(means)]
    for x, real_x in (("same", "day"), ("other", "other day")):
        if real_x in means:
            found += [(x, k, of_shift(real_x, "dusk"), each) for k, each in alone.items()]
    return [
        {
            "x": x,
            "shift": name,
            "overlap": overlap(real, own),
            "spearman": float(scipy.stats.spearmanr(values, own_values).statistic),
        }
        for x, name, (real, values), (own, own_values) in found
    ]


def save_estimates(
    setting: Setting, f: Mapping[str, dict[str, Tensor]], photometric: str, folder: Path
) -> None:
    """Writes F(x) by day with F(x') at dusk, or of a photometric shift, for FISHER.ESTIMATE."""
    seed = setting.cfg.SEED
    options = ["TUNING.METHOD", "fishertune", "FISHER.BATCHES", IMAGES // BATCH]
    config = defining_keys(changed(setting.cfg, options))
    record = replace(setting.trainer._run.record, config=config)
    notes = {"estimator": "diagonal", "labels": "ground_truth", "seed": str(seed)}
    notes[NOTE] = json.dumps(record.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    for name, shifted in (("real_dusk", "dusk"), ("photometric", photometric)):
        own = {**notes, "shifted": shifted}
        estimate = FisherEstimate(f["day"], f[shifted], SHIFT_WEIGHT, IMAGES, own)
        estimate.save(folder / f"{name}_{seed}.safetensors")


def real_shift(setting: Setting, names: Sequence[str], output: Path) -> None:
    """Measures and compares domains with one seed, and adds them to the numbers of others."""
    path, seed = output / "real_shift.json", setting.cfg.SEED
    facts = {"commit": commit(), "torch": torch.__version__, "share": SHARE}
    facts |= {"batch": BATCH, "images": IMAGES, "shift_weight": SHIFT_WEIGHT}
    result = json.loads(path.read_text()) if path.is_file() else {"means": [], "rows": []}
    f = measured(setting, names, output / "real_shift" / str(seed))
    means = {name: mean_over_candidates(each) for name, each in f.items()}
    for key, new in (("means", [means]), ("rows", compare(setting, f))):
        others = [each for each in result[key] if each["seed"] != seed]
        found = others + [{"seed": seed, **each} for each in new]
        result[key] = sorted(found, key=lambda each: each["seed"])
    path.write_text(json.dumps({**result, **facts}, indent=1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Reads the command line and runs it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warmup", type=Path, required=True, help="the checkpoint of a warm-up")
    parser.add_argument("--seed", type=int, default=43, help="the seed of that warm-up")
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/fisher")
    parser.add_argument(
        "--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="default: all"
    )
    parser.add_argument(
        "--save-estimates", type=Path, metavar="FOLDER", help="write files for FISHER.ESTIMATE"
    )
    parser.add_argument(
        "--photometric", choices=PHOTOMETRIC, default=PHOTOMETRIC[0], help="of these files"
    )
    args = parser.parse_args(arguments)
    args.output.mkdir(parents=True, exist_ok=True)
    setting = after_warmup(args.warmup, args.seed, args.output)
    if args.save_estimates is None:
        names = [name for name in DOMAINS if name in {"day", "dusk", *args.domains}]
        real_shift(setting, names, args.output)
        return
    folder = args.output / "real_shift" / str(args.seed)
    f = measured(setting, ["day", "dusk", args.photometric], folder)
    save_estimates(setting, f, args.photometric, args.save_estimates)


if __name__ == "__main__":
    main()
