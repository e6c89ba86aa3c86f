#!/usr/bin/env python
"""Prints the measurements of the benchmarks of the Fisher estimate as tables.

python benchmarks/fisher_tables.py [FOLDER]
"""

import json
import sys
from pathlib import Path

import numpy as np
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from fishertune_d2.analysis.real_shift import shared_seeds  # noqa: E402


def tables(folder: Path) -> None:
    """Prints the measurements of all steps in ``folder``."""
    read = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}
    _agreement(read["convergence"])
    _steps(read["steps"])
    _cost(read["cost"])
    ranked = read["ranking"]
    print(
        f"Ranking {ranked['scores']:,} scores and selecting {ranked['selected']:,}: "
        f"{ranked['seconds']:.0f} s, and {ranked['bytes_beside'] / 2**30:.2f} GiB in addition to "
        f"the {ranked['bytes_scores'] / 2**30:.2f} GiB of the scores.\n"
    )
    if "stability" in read:
        _stability(read["stability"])
    if "score_noise" in read:
        _noise(read["score_noise"])
    if "real_shift" in read:
        _real_shift(read["real_shift"])


KEYS = ("spearman", "overlap", "drf_spearman", "drf_overlap")
WORDS = ["F: Spearman", "F: top 5 % in common", "DRF: Spearman", "DRF: top 5 % in common"]


def _steps(measured: dict) -> None:
    """Prints how well the variational estimators agree with the reference, by batches."""
    _show(
        [
            [curve["estimator"], images // 2] + [f"{curve[key][i]:.4f}" for key in KEYS]
            for curve in measured["curves"]
            for i, images in enumerate(curve["images"])
        ],
        ["estimator", "batches", *WORDS],
    )


def _agreement(measured: dict) -> None:
    """Prints how well estimates from few images agree with the reference."""
    loop = measured["reference"]["seconds_per_image"]
    _show(
        [
            [curve["estimator"], images, f"{curve['seconds'][i] / images / loop:.2f}"]
            + [f"{curve[key][i]:.3f}" for key in KEYS]
            for curve in measured["curves"]
            for i, images in enumerate(curve["images"])
        ],
        ["estimator", "images", "time per image / plain loop's", *WORDS],
    )
    _show(
        [
            [name, half["images"], *(f"{half[key]:.3f}" for key in KEYS)]
            for name, half in measured["halves"].items()
        ],
        ["estimator", "images in each half", *WORDS],
    )


def _stability(measured: dict) -> None:
    """Prints how much of a selection two halves of the images have in common, mean over seeds."""
    found: dict[tuple, list[list[float]]] = {}
    for row in measured["rows"]:
        score = "F" if row["rho"] is None else f"DRF, rho {row['rho']}"
        key = (row["estimator"], row["unit"], row["allocation"], score)
        found.setdefault(key, []).append(row["overlap"])
    estimators = list(dict.fromkeys(estimator for estimator, *_ in found))
    _show(
        [
            [*key, *(f"{sum(both) / len(both):.3f}" for both in zip(*found[key], strict=True))]
            for key in sorted(found, key=lambda key: (estimators.index(key[0]), key[2]))
        ],
        ["estimator", "unit", "allocation", "score", *map(str, measured["rows"][0]["images"])],
    )


def _noise(measured: dict) -> None:
    """Prints how well DRF selects if changes within their noise count less, mean over seeds."""
    errors = _mean_over_seeds(measured["noise"], ("unit", "images"))
    names = ("paired", "between", "above_0.5", "above_1", "above_2")
    _show(
        [[*key, *(f"{row[name]:.2f}" for name in names)] for key, row in errors.items()],
        ["seeds", "unit", "images", "SE, paired / unpaired", "difference of halves / SE"]
        + [f"changes above {z} SE" for z in ("0.5", "1", "2")],
    )
    flat = [{**row, **row["with_truth"]} for row in measured["rows"]]
    rows = _mean_over_seeds(flat, ("unit", "truth_images", "images", "score", "rho", "z"))
    _larger_rho(rows)
    _scores(rows)


def _larger_rho(rows: dict[tuple, dict]) -> None:
    """Prints DRF with each z, beside the rho that has as much in common with F."""
    lines = []
    for (*place, _, rho, z), row in rows.items():
        if rho == 0.01:
            # The line of z 0 ends at F itself.
            line = [
                each
                for (*own, score, _, other_z), each in rows.items()
                if own == place and (other_z == 0 or score == "F")
            ]
            line.sort(key=lambda each: each["with_f"])
            cells = [f"{row['with_f']:.3f}"]
            for name in ("halves", "0.01"):
                points = ([each[key] for each in line] for key in ("with_f", name))
                cells += [f"{row[name]:.3f}", f"{np.interp(row['with_f'], *points):.3f}"]
            lines.append([*place, z, *cells])
    _show(
        lines,
        ["seeds", "unit", "all images", "images", "z", "own F", "halves", "by a larger rho"]
        + ["other half", "by a larger rho"],
    )


def _scores(rows: dict[tuple, dict]) -> None:
    """Prints all scores, of the seeds whose halves have the most images."""
    most = max(largest for _, _, largest, *_ in rows)
    rows = {key: row for key, row in rows.items() if key[2] == most}
    marks = sorted({images for _, _, _, images, *_ in rows})
    _show(
        [
            ["-" if cell is None else cell for cell in key]
            + [f"{found[mark]['halves']:.3f}" for mark in marks]
            + [f"{found[64][name]:.3f}" for name in ("with_f", "0.01", "0.1", "1.0")]
            for key, found in _by_images(rows).items()
        ],
        ["seeds", "unit", "score", "rho", "z", *(f"halves, {mark}" for mark in marks), "own F, 64"]
        + [f"other half by rho {rho}, 64" for rho in ("0.01", "0.1", "1.0")],
    )


def _by_images(rows: dict[tuple, dict]) -> dict[tuple, dict[int, dict]]:
    """Groups rows that differ only in the number of images."""
    found: dict[tuple, dict[int, dict]] = {}
    for (seeds, unit, _, images, *key), row in rows.items():
        found.setdefault((seeds, unit, *key), {})[images] = row
    return found


def _mean_over_seeds(rows: list[dict], keys: tuple[str, ...]) -> dict[tuple, dict[str, float]]:
    """The mean of the numbers of rows that agree in some entries, by seeds and these entries."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    means = {}
    for key, group in found.items():
        seeds = ", ".join(str(row["seed"]) for row in group)
        numbers = (name for name, value in group[0].items() if isinstance(value, float))
        own = [name for name in numbers if name not in keys]
        means[(seeds, *key)] = {name: sum(r[name] for r in group) / len(group) for name in own}
    return means


def _real_shift(measured: dict) -> None:
    """Prints what simulated shifts have in common with the real one, mean over seeds.

    Each shift has a line for the seeds that all shifts have, because only such lines compare, and
    another one for all of its seeds if it has more.
    """
    rows = measured["rows"]
    shared = shared_seeds(rows)
    for key, words in (("overlap", "in common"), ("spearman", "Spearman")):
        found: dict[tuple, dict[str, dict[int, float]]] = {}
        for row in rows:
            if key == "overlap" or row["score"] == "dF":
                cells = found.setdefault((row["x"], row["shift"]), {})
                column = f"{row['unit']}s, {row['score']} {row['rho']}"
                cells.setdefault(column, {})[row["seed"]] = row[key]
        columns = list(next(iter(found.values())))
        lines = []
        for (x, shift), cells in sorted(found.items(), key=lambda item: -ord(item[0][0][0])):
            own = set(cells[columns[0]])
            for seeds in dict.fromkeys([tuple(sorted(own & shared)), tuple(sorted(own))]):
                means = (sum(cells[c][seed] for seed in seeds) / len(seeds) for c in columns)
                numbers = [f"{mean:.3f}" for mean in means]
                lines.append([shift, x, ", ".join(map(str, seeds)), *numbers])
        _show(
            lines, [f"shift: {words} with the real one", "F(x) of the real one", "seeds", *columns]
        )
    means = measured["means"]
    domains = dict.fromkeys(domain for seed in means for domain in seed)
    _show(
        [
            [name, *(f"{seed[name] / seed['day']:.2f}" if name in seed else "-" for seed in means)]
            for name in domains
            if name not in ("seed", "day")
        ],
        ["mean F / mean F by day", *(f"seed {seed['seed']}" for seed in means)],
    )


def _cost(cost: dict) -> None:
    """Prints the time, memory and arithmetic of the estimators."""
    spent, peaks = cost["seconds"], cost["peak_bytes"]
    _show(
        [
            [name, f"{value:.2f}", f"{value / spent['diagonal_loop']:.2f}"]
            for name, value in spent.items()
        ],
        [f"a batch of {cost['batch']} images", "seconds", "ratio to the plain loop"],
    )
    _show(
        [
            [name, f"{value / 2**20:.0f}", f"{(value - peaks['nothing']) / 2**20:.0f}"]
            for name, value in peaks.items()
        ],
        ["process", "peak MiB", "beside model and data"],
    )
    _show(
        [
            [
                name,
                counts["tokens"],
                f"{counts['candidates']:,}",
                *(f"{counts[key] / 2**30:.2f}" for key in counts if key.startswith("bytes")),
                f"{counts['flops_products_per_image'] / 1e9:.0f}",
            ]
            for name, counts in cost["arithmetic"].items()
        ],
        [
            "batch of 4",
            "tokens",
            "candidates",
            "sums of F(x), F(x'), GiB",
            "layers' inputs, GiB",
            "products, GiB",
            "GFLOP of products per image",
        ],
    )


def _show(lines: list[list], headers: list[str]) -> None:
    print(tabulate(lines, headers, tablefmt="github", disable_numparse=True), end="\n\n")


if __name__ == "__main__":
    tables(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs/fisher")
