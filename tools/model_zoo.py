#!/usr/bin/env python
"""Writes MODEL_ZOO.md from the tables of runs in docs/results.

python tools/model_zoo.py
"""

import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.analysis.statistics import (  # noqa: E402 - it need not be installed
    format_mean,
    format_weights,
    markdown_table,
)
from fishertune_d2.analysis.study import StudyRun, read_table  # noqa: E402
from fishertune_d2.bench.learning_rates import read_choices  # noqa: E402
from fishertune_d2.bench.tables import entry_names  # noqa: E402
from fishertune_d2.run import ENTRY, LENGTH, Results, require_same_protocol  # noqa: E402

# The title of each study, and the part of docs/results that reads it.
STUDIES = {
    "table1_camvid": ("Table 1 on CamVid", "tables.md#which-method-is-best-at-dusk"),
    "table1_streets": ("Table 1, trained on the scenes", "tables.md#do-the-built-in-scenes-agree"),
    "selection": ("Which weights to select", "selection.md"),
    "other_kernels": (
        "Same seeds, other CPU kernels",
        "tables.md#how-far-do-cpu-kernels-move-a-score",
    ),
    "warm_moments": (
        "AdamW's moments from the start",
        "tables.md#do-adamws-moments-of-late-weights-matter",
    ),
    "constant_schedule": ("All weights from the start", "tables.md#does-the-growing-share-matter"),
    "shifts": (
        "x' by darker images",
        "selection.md#does-a-better-simulation-of-the-shift-train-better",
    ),
    "share_20": ("20 % of the backbone", "tables.md#does-a-larger-share-close-the-gap"),
    "iterations_900": (
        "900 iterations of tuning",
        "tables.md#do-900-iterations-of-tuning-close-the-gap",
    ),
    "iterations_900_search": (
        "Rates for 900 iterations",
        "tables.md#do-900-iterations-of-tuning-close-the-gap",
    ),
    "iterations_900_share_20": (
        "20 % over 900 iterations",
        "tables.md#do-a-larger-share-and-900-iterations-close-the-gap",
    ),
    "curves_streets": (
        "Rates for long training on the scenes",
        "when.md#does-a-longer-training-change-the-order",
    ),
    "units": ("Neurons", "selection.md#are-neurons-as-good-as-single-weights"),
}

HEAD = """# Model zoo

This page lists results by method and setting: mIoU in percent, mean and sample standard deviation
over seeds. The link in the first column explains the setting and lists its commands. The paper's
own numbers are not here.{large}
Checkpoints are not published. To train a model again, run the commands of its setting.
`python -m fishertune_d2.export delta OUTPUT_DIR --decoder` then makes a small file of the trained
model.

*Rate* is the learning rate of the backbone as a multiple of `SOLVER.BASE_LR`, if it was searched.
If there are other seeds, the table leaves out the seed of the search. *Steps* are the iterations of
warm-up and of tuning. The tables `docs/results/*.jsonl` have one line for each run, with its seed,
commit, IoU by class and seconds. This command reads them and writes this page:

```sh
python tools/model_zoo.py
```"""
NONE_LARGE = " **No ViT-L or larger model has been trained here yet.**"


@dataclass(frozen=True)
class Model:
    """The runs of one method in one study that differ in their seed.

    Attributes:
        study: The study's name.
        runs: The runs.
        results: Their scores.
    """

    study: str
    runs: Sequence[StudyRun]
    results: Sequence[Results]

    @property
    def setting(self) -> tuple[str, tuple[str, ...], tuple[str, ...], str]:
        """The foundation model, the training data, the test sets and the protocol's name."""
        run, results = self.runs[0], self.results[0]
        # In one order, because a run records its own.
        return run.vfm, run.train, tuple(sorted(results.scores)), results.protocol_name

    @property
    def line(self) -> list[str]:
        """The model's line of its table."""
        run, results = self.runs[0], self.results[0]
        title, page = STUDIES[self.study]
        warmup, tuned = results.protocol["warmup_iterations"], results.tuned_parameters
        return [
            f"[{title}](docs/results/{page})",
            run.entry,
            "-" if run.rate is None else f"{run.rate:g}",
            f"{warmup} + {results.protocol['iterations'] - warmup}",
            str(len(self.runs)),
            "-" if tuned is None else format_weights([tuned]),
            *(format_mean([r.scores[name] for r in self.results]) for name in self.setting[2]),
        ]


def read_models(table: Path) -> Iterator[Model]:
    """Reads the models of a study, without the learning rates that a search rejected.

    Args:
        table: The study's table.

    Yields:
        The models, those on the dev sets first.
    """
    groups: dict[tuple[bool, str, str], list[StudyRun]] = {}
    for run in read_table(table):
        groups.setdefault((run.tested, run.vfm, run.entry), []).append(run)
    searched = {run.seed for runs in groups.values() for run in runs if _has_other_rate(run, runs)}
    names = entry_names()
    for tested, vfm, entry in sorted(
        groups, key=lambda key: (*key[:2], names.index(key[2].partition("@")[0]), key[2])
    ):
        runs = groups[tested, vfm, entry]
        kept = [run for run in runs if run.seed not in searched]
        if not kept:
            choice = read_choices(table / vfm)[entry]["rate"] if runs[0].rate is not None else None
            kept = [run for run in runs if run.rate == choice]
        results = [run.results(table) for run in kept]
        yield Model(table.stem, kept, results)


def _has_other_rate(run: StudyRun, runs: Sequence[StudyRun]) -> bool:
    return any(other.seed == run.seed and other.rate != run.rate for other in runs)


def section(models: Sequence[Model]) -> str:
    """Returns the heading and the table of models with the same setting."""
    vfm, train, sets, protocol = models[0].setting
    every = [results for model in models for results in model.results]
    require_same_protocol(every, vary=(*ENTRY, *LENGTH, "seed"), sets=sets)
    headers = ["setting", "method", "rate", "steps", "seeds", "weights tuned", *sets]
    lines = [model.line for model in models]
    table = markdown_table(lines, headers)
    sizes = {tuple(size) for size in every[0].protocol.get("test_size", {}).values() if size}
    if protocol:
        table = f"Protocol: `{protocol}`.\n\n{table}"
    elif sizes:
        words = " or ".join(f"{width} x {height}" for width, height in sorted(sizes))
        table = f"No named protocol: test images of {words} pixels.\n\n{table}"
    return f"## `{vfm}`, trained on {', '.join(train)}: {', '.join(sets)}\n\n{table}"


def page(results: Path) -> str:
    """Makes the text of MODEL_ZOO.md.

    Args:
        results: The folder of all tables of runs.

    Returns:
        The text.

    Raises:
        ValueError: A study has no title; the message names its file.
    """
    tables = sorted(results.glob("*.jsonl"))
    unknown = [str(table) for table in tables if table.stem not in STUDIES]
    if unknown:
        raise ValueError(
            f"{', '.join(unknown)}: add a title and a page to STUDIES of tools/model_zoo.py"
        )
    tables.sort(key=lambda table: list(STUDIES).index(table.stem))
    groups: dict[tuple, list[Model]] = {}
    for table in tables:
        for model in read_models(table):
            groups.setdefault(model.setting, []).append(model)
    large = any(re.search(r"_vit(l|h|g|7b)", vfm) for vfm, *_ in groups)
    head = HEAD.format(large="" if large else NONE_LARGE)
    return "\n\n".join([head, *map(section, groups.values())]) + "\n"


if __name__ == "__main__":
    (ROOT / "MODEL_ZOO.md").write_text(page(ROOT / "docs/results"))
    print(ROOT / "MODEL_ZOO.md")
