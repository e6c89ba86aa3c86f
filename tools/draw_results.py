#!/usr/bin/env python
"""Prints the table of results of the README, and draws it as a bar chart.

python tools/draw_results.py     # writes docs/images/results.svg
"""

import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from readme_svg import box, drawing, text  # noqa: E402

from fishertune_d2.analysis.statistics import (  # noqa: E402
    format_difference,
    format_mean,
    format_weights,
    markdown_table,
    mean_and_std,
    paired_difference,
)
from fishertune_d2.analysis.study import find_runs  # noqa: E402
from fishertune_d2.run import Results, require_same_protocol  # noqa: E402

PICTURE = ROOT / "docs/images/results.svg"
STUDY = ROOT / "docs/results/table1_camvid.jsonl/dinov2_vits"
SOURCE, UNSEEN = "camvid_day_test", "camvid_dusk_test"
OURS = "fishertune"
# The methods with three seeds, and the parts of the backbone that each trains.
METHODS = {
    "freeze": "nothing",
    "soma": "minor singular components",
    "rein": "added tokens",
    "lora": "added low-rank matrices",
    "childtune": "its weights with the highest F",
    OURS: "its weights with the highest DRF",
    "full": "all of its weights",
}
WIDTH, BAR, LEFT, SCALE = 760, 34, 130, 9.5  # pixels; SCALE: pixels for one point of mIoU


def read() -> dict[str, dict[int, Results]]:
    """Reads the scores on the test sets.

    Returns:
        The results by seed, for each method.

    Raises:
        ValueError: if a method of the table has no runs.
    """
    found: dict[str, dict[int, Results]] = {method: {} for method in METHODS}
    for path, results in find_runs(STUDY, test=True).items():
        method = Path(path).name.rpartition("_")[0].partition("@")[0]
        if method in found:
            found[method][results.seed] = results
    missing = [method for method, by_seed in found.items() if not by_seed]
    if missing:
        raise ValueError(f"{STUDY} has no test scores of {', '.join(missing)}")
    require_same_protocol(
        [results for by_seed in found.values() for results in by_seed.values()],
        vary=("method", "seed", "commit", "warmup_iterations"),
    )
    return found


def scores(found: Mapping[int, Results], data_set: str) -> dict[int, float]:
    """Returns the mIoU in percent on a data set by seed."""
    return {seed: results.scores[data_set] for seed, results in sorted(found.items())}


def table(found: Mapping[str, Mapping[int, Results]]) -> str:
    """Formats the README's table.

    Args:
        found: The results by method and seed.

    Returns:
        The table in Markdown.
    """
    ours = scores(found[OURS], UNSEEN)
    lines = []
    for method, trained in METHODS.items():
        seeds = found[method]
        difference = None if method == OURS else paired_difference(ours, scores(seeds, UNSEEN))
        tuned = next(iter(seeds.values())).tuned_parameters or 0
        lines.append(
            [
                f"**`{method}`**" if method == OURS else f"`{method}`",
                trained,
                format_weights([tuned]),
                format_mean(list(scores(seeds, SOURCE).values())),
                format_mean(list(scores(seeds, UNSEEN).values())),
                format_difference(difference),
            ]
        )
    headers = ["`TUNING.METHOD`", "trains in the backbone", "weights", "day (source)"]
    headers += ["dusk (unseen)", "FisherTune minus method, at dusk"]
    return markdown_table(lines, headers)


def draw(found: Mapping[str, Mapping[int, Results]]) -> str:
    """Draws the mIoU at dusk as a bar chart.

    Args:
        found: The results by method and seed.

    Returns:
        The content of the SVG file.
    """
    parts = [
        text(24, 38, "mIoU at dusk, in %", "head"),
        text(24, 60, "trained by day; mean and standard deviation over seeds", "quiet"),
    ]
    for i, method in enumerate(METHODS):
        mean, std = mean_and_std(list(scores(found[method], UNSEEN).values()))
        spread = SCALE * (std or 0)
        top, end = 80 + i * (BAR + 8), LEFT + SCALE * mean
        middle = top + BAR / 2
        parts += [
            text(LEFT - 12, middle + 5, method, "right bold" if method == OURS else "right"),
            box("trains" if method == OURS else "frozen", LEFT, top, SCALE * mean, BAR, radius=3),
            f'<path class="line" d="M{end - spread:.1f} {middle:g}H{end + spread:.1f}"/>',
            text(end + spread + 10, middle + 5, f"{mean:.1f}"),
        ]
    height = 80 + len(METHODS) * (BAR + 8) + 16
    return drawing(WIDTH, height, "mIoU at dusk of each method", *parts)


if __name__ == "__main__":
    runs = read()
    PICTURE.write_text(draw(runs), encoding="utf-8")
    print(table(runs))
    print(PICTURE.relative_to(ROOT))
