"""Writes the table of finished cells as CSV, Markdown and a figure, with the paper's numbers."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fishertune_d2.analysis.methods import OURS, commits_of, draw, tuned_counts
from fishertune_d2.analysis.statistics import (
    CONFIDENCE,
    Difference,
    format_difference,
    format_mean,
    format_weights,
    markdown_table,
    mean_and_std,
    paired_difference,
)
from fishertune_d2.run import ENTRY, LENGTH, Results, require_same_protocol

from .cells import Cell

AVERAGE = "average over unseen"

# mIoU in percent by foundation model, entry and data set (or AVERAGE).
Numbers = Mapping[tuple[str, str, str], float]


def paper_numbers(table: str) -> dict[tuple[str, str, str], float]:
    """Returns the paper's numbers, as printed in its Tables 1 to 5.

    The labels of EVA-02 in Table 2 are shifted by one in the paper; the file corrects this.

    Args:
        table: ``Table.paper``.
    """
    with open(Path(__file__).with_name("paper.csv"), newline="") as file:
        lines = [line for line in csv.DictReader(file) if line["table"] == table]
    names = {"average": AVERAGE}
    return {
        (line["vfm"], line["entry"], names.get(line["set"], line["set"])): float(line["miou"])
        for line in lines
    }


@dataclass(frozen=True)
class Line:
    """The finished cells of an entry and a foundation model."""

    vfm: str
    entry: str
    rate: float | None  # the chosen learning rate; None for the config's
    scores: Mapping[str, Mapping[int, float]]  # mIoU in percent, by data set or AVERAGE, and seed
    tuned: Sequence[int]  # how many backbone weights were tuned or added
    commits: Sequence[str]  # those that scored the runs
    protocol: str = ""  # the name of the protocol under which they were scored


def read_lines(finished: Sequence[tuple[Cell, Results]], sets: Sequence[str]) -> list[Line]:
    """Gathers finished cells by foundation model and entry, in the order of the cells.

    Args:
        finished: The cells and their scores; different protocols raise a ValueError.
        sets: The data sets to show.

    Returns:
        A line for each foundation model and entry.
    """
    found: dict[tuple[str, str, float | None], dict[int, Results]] = {}
    for cell, results in finished:
        found.setdefault((cell.vfm, cell.entry.name, cell.rate), {})[cell.seed] = results
    every = [results for _, results in finished]
    # Options of an entry may change how long it trains, and --set may change it for all cells.
    require_same_protocol(every, vary=(*ENTRY, *LENGTH, "vfm", "seed"), sets=sets)
    lines = []
    for (vfm, entry, rate), runs in found.items():
        by_seed = {seed: _scores(runs[seed], sets) for seed in sorted(runs)}
        scores = {
            key: {seed: of_seed[key] for seed, of_seed in by_seed.items()}
            for key in next(iter(by_seed.values()))
        }
        of_line = list(runs.values())
        tuned, commits = tuned_counts(of_line), commits_of(of_line)
        lines.append(Line(vfm, entry, rate, scores, tuned, commits, of_line[0].protocol_name))
    return lines


def _scores(results: Results, sets: Sequence[str]) -> dict[str, float]:
    unseen = [results.targets[name] for name in sets if name in results.targets]
    average = {AVERAGE: float(np.mean(unseen))} if unseen else {}
    return {name: results.scores[name] for name in sets} | average


def differences(lines: Sequence[Line], key: str) -> dict[tuple[str, str], Difference]:
    """Subtracts each entry from FisherTune on the same foundation model, seed by seed.

    Args:
        lines: The lines of a table.
        key: A data set, or ``AVERAGE``.

    Returns:
        The differences by foundation model and entry, without those that share no seed with it.
    """
    ours = {line.vfm: line.scores for line in lines if line.entry == OURS}
    found = {
        (line.vfm, line.entry): paired_difference(ours[line.vfm][key], line.scores[key])
        for line in lines
        if line.entry != OURS and line.vfm in ours and key in line.scores
    }
    return {place: difference for place, difference in found.items() if difference}


def _printed(paper: Numbers, line: Line) -> dict[str, float]:
    """Returns the paper's numbers of a line, by data set."""
    place = line.vfm, line.entry
    return {key: number for (vfm, entry, key), number in paper.items() if (vfm, entry) == place}


def write_csv(lines: Sequence[Line], path: Path, paper: Numbers) -> None:
    """Writes a line for each foundation model, entry and data set."""
    header = "vfm entry rate tuned_parameters set seeds mean std"
    header += f" {OURS}_minus_entry low high pairs paper commits"
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")  # it writes None as ""
        writer.writerow(header.split())
        for key in lines[0].scores:
            ours = differences(lines, key)
            for line in lines:
                place, values = (line.vfm, line.entry), list(line.scores[key].values())
                numbers = [*mean_and_std(values), None, None, None]
                difference = ours.get(place)
                if difference is not None:
                    numbers[2:] = [difference.mean, difference.low, difference.high]
                cells = [*place, line.rate, " ".join(map(str, line.tuned)), key, len(values)]
                cells += [None if number is None else f"{number:.4f}" for number in numbers]
                cells += [difference.pairs if difference else 0, _printed(paper, line).get(key)]
                writer.writerow([*cells, " ".join(line.commits)])


def format_markdown(title: str, lines: Sequence[Line], paper: Numbers, missing: int) -> str:
    """Returns the title, the table, and how to read it; see :func:`write_table`."""
    keys = list(lines[0].scores)
    main = AVERAGE if AVERAGE in keys else keys[-1]
    ours = differences(lines, main)
    body = []
    for line in lines:
        place, printed = (line.vfm, line.entry), _printed(paper, line)
        means = {key: format_mean(list(scores.values())) for key, scores in line.scores.items()}
        for key in keys:
            if key in printed:
                means[key] += f" ({printed[key]:.1f})"
        seeds = max(len(of_set) for of_set in line.scores.values())
        rate = "-" if line.rate is None else f"{line.rate:g}"
        numbers = [seeds, rate, format_weights(line.tuned), *means.values()]
        body.append([*place, *numbers, format_difference(ours.get(place))])
    headers = ["foundation model", "method", "seeds", "learning rate", "tuned", *keys]
    headers.append(f"{OURS} minus method")
    notes = "mIoU in percent: mean ± sample standard deviation over seeds"
    notes += "; the paper's number in brackets. " if paper else ". "
    notes += (
        f"Last column: the difference in {main}, seed by seed, with its {CONFIDENCE:.0%} "
        "confidence interval (Student's t). Learning rate: the backbone's, as a share of "
        "SOLVER.BASE_LR, if it was chosen on the dev sets."
    )
    if missing:
        notes += f" Not finished: {missing} of the requested cells."
    (protocol, *others) = {line.protocol for line in lines}
    if protocol and not others:
        notes += f" Protocol: {protocol}."
    commits = ", ".join(dict.fromkeys(commit for line in lines for commit in line.commits))
    return f"# {title}\n\n{markdown_table(body, headers)}\n\n{notes}\n\nCommits: {commits}\n"


def write_table(
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
        title: The title.
        lines: The lines, at least one.
        path: The path of the files, without suffix.
        paper: The paper's numbers; empty if the setting is not the paper's.
        missing: The number of cells that are not finished.
        averages: Whether to draw averages over unseen domains instead of data sets.

    Returns:
        The Markdown.
    """
    write_csv(lines, Path(f"{path}.csv"), paper)
    text = format_markdown(title, lines, paper, missing)
    Path(f"{path}.md").write_text(text)
    several = len({line.vfm for line in lines}) > 1
    keys = [AVERAGE] if averages else [key for key in lines[0].scores if key != AVERAGE]
    points: dict[str, dict[str, list[float]]] = {}
    marks: dict[str, dict[str, float]] = {}
    for line in lines:
        label = f"{line.vfm} {line.entry}" if several else line.entry
        points[label] = {key: list(line.scores[key].values()) for key in keys}
        marks[label] = {k: number for k, number in _printed(paper, line).items() if k in keys}
    draw(points, Path(f"{path}.png"), {name: mark for name, mark in marks.items() if mark})
    return text
