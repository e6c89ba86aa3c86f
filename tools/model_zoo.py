#!/usr/bin/env python
"""Writes MODEL_ZOO.md from what runs wrote.

python tools/model_zoo.py

Read is every docs/results/<table>/**/<row>_<seed>/results.json, as the bench names its folders.
"""

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.bench.cells import Cell, make_cells  # noqa: E402 - it need not be installed
from fishertune_d2.bench.tables import PROFILES, TABLES, find_row  # noqa: E402
from fishertune_d2.evaluation import all_scores  # noqa: E402

HEAD = """# Model zoo

Every model of which this project has a score, and no other: a line is one run, read from the
`results.json` that it wrote. The paper's numbers are not ours and not here.{large} Checkpoints are
not given away: the command above a table, or on the page that reads it, trains its models again,
and `python -m fishertune_d2.export delta OUTPUT_DIR --decoder` makes a small file of one.

mIoU is in percent. *Steps* are those of the warm-up and those of tuning; *commit* is that of the
code that scored. This page is written by a command, which takes up all below `docs/results/`:

```sh
python tools/model_zoo.py
```"""
NONE_LARGE = " **No ViT-L, nor a\nlarger model, has been trained here yet.**"


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        table: the folder below docs/results that holds it; a table of the bench, or another.
        row: the way to tune, as the bench calls it.
        results: its ``results.json``.
        profile: of the bench; "" if the table is none of the bench's.
        cell: what the bench runs for it; None if the table is none of the bench's.
    """

    table: str
    row: str
    results: dict[str, Any]
    profile: str
    cell: Cell | None

    @property
    def scores(self) -> dict[str, float]:
        """The mIoU by data set."""
        return all_scores(self.results)

    @property
    def vfm(self) -> str:
        """The foundation model; the first runs did not write it down."""
        return self.results["protocol"].get("vfm") or (self.cell.vfm if self.cell else "-")

    @property
    def train(self) -> tuple[str, ...]:
        """What it was trained on; the first runs did not write it down."""
        recipe = self.cell.recipe if self.cell else {"DATASETS.TRAIN": ()}
        return tuple(self.results["protocol"].get("train") or recipe["DATASETS.TRAIN"])

    @property
    def shared(self) -> tuple:
        """What all lines of a table have in common."""
        in_a_line = {"method", "seed", "commit", "iterations", "warmup_iterations"}
        elsewhere = {"vfm", "train", "test_size", "classes"}
        protocol = ", ".join(
            f"{key} {value}"
            for key, value in self.results["protocol"].items()
            if key not in in_a_line | elsewhere
        )
        return (self.table, self.profile, self.vfm, self.train, tuple(self.scores), protocol)

    @property
    def line(self) -> list[str]:
        """Its line of the table."""
        protocol = self.results["protocol"]
        warmup = protocol["warmup_iterations"]
        config = self.cell.config if self.cell else ""
        return [
            self.row,
            str(protocol["seed"]),
            f"{warmup} + {protocol['iterations'] - warmup}",
            f"{self.results['tuned_parameters'] / 1e6:.2f} M",
            *(f"{score:.2f}" for score in self.scores.values()),
            f"[{Path(config).name}](configs/{config})" if config else "-",
            protocol.get("commit") or "unknown",
        ]


def read_run(file: Path, results: Path) -> Run:
    """Reads a run.

    Args:
        file: its ``results.json``.
        results: the folder of all tables.

    Raises:
        ValueError: if the names of its folders do not say which table, row and seed it is of.
    """
    content = json.loads(file.read_text())
    seed = content["protocol"]["seed"]
    table, *below = file.relative_to(results).parent.parts
    named = [part for part in below if re.fullmatch(rf".+_{seed}", part)]
    if not named:
        raise ValueError(f"{file}: lay it into {results}/<table>/<row>_{seed}/, as the bench does")
    row = named[-1].removesuffix(f"_{seed}")
    run = Run(table, row, content, "", None)
    for name, profile in PROFILES.items() if table in TABLES else ():
        tests = [*chain(*profile.test.values())] or TABLES[table].test
        if not {*run.scores} <= {*profile.dev, *tests}:
            continue
        (cell,) = make_cells(
            [find_row(row.partition("@")[0])],  # after the @ stands what a sweep changes
            [content["protocol"].get("vfm") or profile.vfms[0]],
            [seed],
            profile=profile,
            source=TABLES[table].source if name == "paper" else "",
            output=Path(),
            rates={},
        )
        found = Run(table, row, content, name, cell)
        if found.train == tuple(cell.recipe["DATASETS.TRAIN"]):
            return found
    return run


def section(runs: Sequence[Run]) -> str:
    """A heading, how its runs came about, and their table."""
    table, profile, vfm, train, sets, protocol = runs[0].shared
    words = [f"`{vfm}`, trained on {', '.join(train)}; {protocol}."]
    dev = PROFILES[profile].dev if profile else ()
    # Where there are no sets to choose on, all that is scored is a test.
    kind = "dev" if {*sets} <= {*dev} else "test" if dev else ""
    own = f"docs/results/{table}.md"
    about = own if (ROOT / own).is_file() else "docs/results/tables.md"
    words.append(f"A reading: [{about}]({about}).")
    title = TABLES[table].title if table in TABLES else table
    lines = [f"## {title}" + (f", {kind} sets" if kind else ""), " ".join(words)]
    if profile:
        data = " and ".join(dict.fromkeys(name.split("_")[0] for name in (*train, *sets)))
        command = f"python -m fishertune_d2.bench {table} --profile {profile}"
        command += " --methods ROW --seeds N" + (" --test" if kind == "test" else "")
        lines.append(f"```sh\n# needs data: {data}\n{command}\n```")
    headers = ["row", "seed", "steps", "weights tuned", *sets, "config", "commit"]
    cells = [run.line for run in runs]
    return "\n\n".join([*lines, tabulate(cells, headers, tablefmt="github", disable_numparse=True)])


def page(results: Path) -> str:
    """The page.

    Args:
        results: the folder of all tables.
    """
    runs = [read_run(file, results) for file in results.rglob("results.json")]
    runs.sort(key=lambda run: (run.shared, _place(run), run.results["protocol"]["seed"]))
    groups: dict[tuple, list[Run]] = {}
    for run in runs:
        groups.setdefault(run.shared, []).append(run)
    large = any(re.search(r"_vit(l|h|g|7b)", run.vfm) for run in runs)
    head = HEAD.format(large="" if large else NONE_LARGE)
    return "\n\n".join([head, *map(section, groups.values())]) + "\n"


def _place(run: Run) -> tuple[int, str]:
    rows = TABLES[run.table].rows if run.table in TABLES else ()
    return (rows.index(run.row) if run.row in rows else len(rows), run.row)


if __name__ == "__main__":
    (ROOT / "MODEL_ZOO.md").write_text(page(ROOT / "docs/results"))
    print(ROOT / "MODEL_ZOO.md")
