"""Tables of finished cells: CSV, Markdown and a figure, with the paper's numbers beside ours."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from fishertune_d2.analysis.rows import draw
from fishertune_d2.analysis.statistics import (
    CONFIDENCE,
    Difference,
    format_difference,
    format_mean,
    mean_and_std,
    paired_difference,
)
from fishertune_d2.evaluation import all_scores

from .cells import Cell
from .tables import OURS

AVERAGE = "average over unseen"
_PAPER = Path(__file__).with_name("paper.csv")

Numbers = Mapping[tuple[str, str, str], float]  # by foundation model, row and set, in percent


def paper_numbers(table: str) -> dict[tuple[str, str, str], float]:
    """What the paper prints, by foundation model, row and set (or ``AVERAGE``), mIoU in percent.

    The file holds its Tables 1 to 5 as printed, but for Table 2's labels of EVA-02, which are
    shifted by one there.

    Args:
        table: a name in ``TABLES``.
    """
    with open(_PAPER, newline="") as file:
        return {
            (line["vfm"], line["row"], AVERAGE if line["set"] == "average" else line["set"]): float(
                line["miou"]
            )
            for line in csv.DictReader(file)
            if line["table"] == table
        }


@dataclass(frozen=True)
class Line:
    """The finished cells of a row and a foundation model.

    Attributes:
        vfm: the foundation model.
        row: the row's name.
        rate: what was chosen as its learning rate; None for the config's.
        scores: by set (or ``AVERAGE``) and seed, mIoU in percent.
        tuned: backbone weights that are tuned, or that were added.
        commits: of the runs.
    """

    vfm: str
    row: str
    rate: float | None
    scores: Mapping[str, Mapping[int, float]]
    tuned: tuple[int, ...]
    commits: tuple[str, ...]


def read_lines(cells: Sequence[Cell], sets: Sequence[str], name: str) -> list[Line]:
    """The finished of the cells, by foundation model and row, in the order of the cells.

    Args:
        cells: of a table.
        sets: data sets to read.
        name: folder that later scores are in; see ``Cell.results``.

    Raises:
        ValueError: if cells were scored by different protocols.
    """
    found: dict[tuple[str, str], list[tuple[Cell, dict[str, Any]]]] = {}
    first = None
    for cell in cells:
        results = cell.results(sets, name)
        if results is None:
            continue
        first = first or (cell, results)
        _require_same_scoring(first, (cell, results), sets)
        found.setdefault((cell.vfm, cell.row.name), []).append((cell, results))
    lines = []
    for (vfm, row), runs in found.items():
        by_seed = {cell.seed: _scores(results, sets) for cell, results in runs}
        lines.append(
            Line(
                vfm,
                row,
                runs[0][0].rate,
                {
                    key: {seed: scores[key] for seed, scores in sorted(by_seed.items())}
                    for key in next(iter(by_seed.values()))
                },
                tuple(sorted({r["tuned_parameters"] for _, r in runs})),
                tuple(sorted({r["protocol"].get("commit") or "unknown" for _, r in runs})),
            )
        )
    return lines


def _scores(results: Mapping[str, Any], sets: Sequence[str]) -> dict[str, float]:
    scores = all_scores(results)
    unseen = [results["targets"][name] for name in sets if name in results["targets"]]
    average = {AVERAGE: float(np.mean(unseen))} if unseen else {}
    return {name: scores[name] for name in sets} | average


def _require_same_scoring(
    first: tuple[Cell, Mapping], other: tuple[Cell, Mapping], sets: Sequence[str]
) -> None:
    def scoring(results: Mapping) -> dict[str, Any]:
        protocol = results["protocol"]
        said = {key: protocol.get(key) for key in ("mode", "crop", "stride", "class_rule", "train")}
        said["precision"] = protocol.get("precision", "float32")
        for key in ("test_size", "classes"):
            said |= {f"{key} of {name}": protocol.get(key, {}).get(name) for name in sets}
        return said | {f"halved {name}": name in protocol.get("halved_labels", ()) for name in sets}

    one, two = scoring(first[1]), scoring(other[1])
    # What a run of an earlier version does not say is not compared.
    differing = [key for key in one if one[key] != two[key] and None not in (one[key], two[key])]
    if differing:
        raise ValueError(
            f"{other[0].folder} was scored otherwise than {first[0].folder}: they differ in "
            f"{', '.join(differing)}; score one of them again"
        )


def differences(lines: Sequence[Line], key: str) -> dict[tuple[str, str], Difference]:
    """FisherTune minus each rival on the same foundation model, seed by seed.

    Args:
        lines: of a table.
        key: the set, or ``AVERAGE``.

    Returns:
        By foundation model and row; without those that share no seed with it.
    """
    ours = {line.vfm: line.scores for line in lines if line.row == OURS}
    found = {
        (line.vfm, line.row): paired_difference(ours[line.vfm][key], line.scores[key])
        for line in lines
        if line.row != OURS and line.vfm in ours and key in line.scores
    }
    return {place: difference for place, difference in found.items() if difference}


def write_csv(lines: Sequence[Line], path: Path, paper: Numbers) -> None:
    """Writes a line for each foundation model, row and set.

    Args:
        lines: of a table.
        path: the file.
        paper: the paper's numbers; empty where the setting is not its own.
    """
    header = "vfm row rate tuned_parameters set seeds mean std"
    header += f" {OURS}_minus_row low high pairs paper commits"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header.split())
        for key in lines[0].scores:
            ours = differences(lines, key)
            for line in lines:
                values = list(line.scores[key].values())
                difference = ours.get((line.vfm, line.row), Difference(0, None))
                numbers = [*mean_and_std(values), difference.mean, difference.low, difference.high]
                writer.writerow(
                    [
                        *(line.vfm, line.row, line.rate, " ".join(map(str, line.tuned)), key),
                        len(values),
                        *("" if number is None else f"{number:.4f}" for number in numbers),
                        *(difference.pairs, paper.get((line.vfm, line.row, key), "")),
                        " ".join(line.commits),
                    ]
                )


def format_markdown(title: str, lines: Sequence[Line], paper: Numbers, missing: int) -> str:
    """The table for a person.

    Args:
        title: what it shows.
        lines: of the table.
        paper: the paper's numbers; empty where the setting is not its own.
        missing: cells that are not finished.
    """
    keys = list(lines[0].scores)
    main = AVERAGE if AVERAGE in keys else keys[-1]
    ours = differences(lines, main)
    body = []
    for line in lines:
        cells = [
            _mean(list(line.scores[key].values()), paper.get((line.vfm, line.row, key)))
            for key in keys
        ]
        body.append(
            [
                *(line.vfm, line.row, max(len(seeds) for seeds in line.scores.values())),
                "-" if line.rate is None else f"{line.rate:g}",
                ", ".join(f"{count / 1e6:.2f} M" for count in line.tuned),
                *cells,
                format_difference(ours.get((line.vfm, line.row))),
            ]
        )
    headers = ["foundation model", "row", "seeds", "learning rate", "tuned", *keys]
    headers.append(f"{OURS} minus row")
    notes = "mIoU in percent: mean ± sample standard deviation over seeds"
    notes += "; in brackets what the paper prints. " if paper else ". "
    notes += (
        f"Last column: difference in {main}, seed by seed, with its {CONFIDENCE:.0%} confidence "
        "interval (Student's t). Learning rate: of the backbone, as a share of SOLVER.BASE_LR, if "
        "it was chosen on the dev sets."
    )
    if missing:
        notes += f" Not finished: {missing} of the cells asked for."
    commits = ", ".join(dict.fromkeys(commit for line in lines for commit in line.commits))
    table = tabulate(body, headers, tablefmt="github", disable_numparse=True)
    return f"# {title}\n\n{table}\n\n{notes}\n\nCommits: {commits}\n"


def _mean(values: Sequence[float], paper: float | None) -> str:
    text = format_mean(values)
    return text if paper is None else f"{text} ({paper:.1f})"


def write_report(
    title: str,
    lines: Sequence[Line],
    path: Path,
    *,
    paper: Numbers,
    missing: int = 0,
    averages: bool = False,
) -> str:
    """Writes ``<path>.csv``, ``.md`` and ``.png``.

    Args:
        title: what the table shows.
        lines: at least one.
        path: of the files, without suffix.
        paper: the paper's numbers; empty where the setting is not its own.
        missing: cells that are not finished.
        averages: draw averages over unseen domains instead of data sets.

    Returns:
        The Markdown.
    """
    write_csv(lines, Path(f"{path}.csv"), paper)
    text = format_markdown(title, lines, paper, missing)
    Path(f"{path}.md").write_text(text)
    several = len({line.vfm for line in lines}) > 1
    keys = [AVERAGE] if averages else [key for key in lines[0].scores if key != AVERAGE]
    points, marks = {}, {}
    for line in lines:
        label = f"{line.vfm} {line.row}" if several else line.row
        points[label] = {key: list(line.scores[key].values()) for key in keys}
        marks[label] = {
            key: paper[line.vfm, line.row, key]
            for key in keys
            if (line.vfm, line.row, key) in paper
        }
    draw(points, Path(f"{path}.png"), {row: mark for row, mark in marks.items() if mark})
    return text
