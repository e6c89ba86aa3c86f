#!/usr/bin/env python
"""Prints the measurements of fisher.py and selection_stability.py as Markdown tables.

python benchmarks/fisher_tables.py [FOLDER]
"""

import json
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]


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
