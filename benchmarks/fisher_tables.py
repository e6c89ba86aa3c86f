#!/usr/bin/env python
"""Prints what benchmarks/fisher.py measured as Markdown tables.

python benchmarks/fisher_tables.py [FOLDER]
"""

import json
import sys
from pathlib import Path

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]


def tables(folder: Path) -> None:
    """Prints what the steps measured as Markdown tables."""
    read = {file.stem: json.loads(file.read_text()) for file in folder.glob("*.json")}

    def show(rows: list[list], headers: list[str]) -> None:
        print(tabulate(rows, headers, tablefmt="github", disable_numparse=True), end="\n\n")

    keys = ("spearman", "overlap", "drf_spearman", "drf_overlap")
    words = ["F: Spearman", "F: top 5 % in common", "DRF: Spearman", "DRF: top 5 % in common"]
    measured = read["convergence"]
    loop = measured["reference"]["seconds_per_image"]
    show(
        [
            [curve["estimator"], images, f"{curve['seconds'][i] / images / loop:.2f}"]
            + [f"{curve[key][i]:.3f}" for key in keys]
            for curve in measured["curves"]
            for i, images in enumerate(curve["images"])
        ],
        ["estimator", "images", "time per image / plain loop's", *words],
    )
    show(
        [
            [name, half["images"], *(f"{half[key]:.3f}" for key in keys)]
            for name, half in measured["halves"].items()
        ],
        ["estimator", "images in each half", *words],
    )
    spent = read["cost"]["seconds"]
    show(
        [
            [name, f"{value:.2f}", f"{value / spent['diagonal_loop']:.2f}"]
            for name, value in spent.items()
        ],
        [f"a batch of {read['cost']['batch']} images", "seconds", "ratio to the plain loop"],
    )
    peaks = read["cost"]["peak_bytes"]
    show(
        [
            [name, f"{value / 2**20:.0f}", f"{(value - peaks['nothing']) / 2**20:.0f}"]
            for name, value in peaks.items()
        ],
        ["process", "peak MiB", "beside model and data"],
    )
    show(
        [
            [
                name,
                row["tokens"],
                f"{row['candidates']:,}",
                *(f"{row[key] / 2**30:.2f}" for key in row if key.startswith("bytes")),
                f"{row['flops_products_per_image'] / 1e9:.0f}",
            ]
            for name, row in read["cost"]["arithmetic"].items()
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
    ranked = read["ranking"]
    print(
        f"Ranking {ranked['scores']:,} scores and selecting {ranked['selected']:,}: "
        f"{ranked['seconds']:.0f} s, {ranked['bytes_beside'] / 2**30:.2f} GiB beside the scores' "
        f"{ranked['bytes_scores'] / 2**30:.2f} GiB."
    )


if __name__ == "__main__":
    tables(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "outputs/fisher")
