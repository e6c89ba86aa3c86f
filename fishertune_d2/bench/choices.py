"""The search over learning rates, the same for each row: choices.json beside the cells.

Chosen is what has the highest mIoU on the profile's dev sets, their mean, with one seed.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fishertune_d2.evaluation import all_scores
from fishertune_d2.files import whole_file

from .cells import Cell

TEST = "test"  # a cell's folder for what is scored once, at the end


def read_choices(place: Path) -> dict[str, dict[str, Any]]:
    """What was chosen for each row, its rate and from which scores; empty without a file.

    Args:
        place: folder of a foundation model's cells.
    """
    file = place / "choices.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def write_choices(place: Path, cells: Sequence[Cell], sets: Sequence[str]) -> dict[str, Any]:
    """Chooses for each row among its finished cells, and the rates that were tried before.

    Args:
        place: folder of a foundation model's cells.
        cells: of one seed, with their rates; a row's choice stays as it is while one of its cells
            is not finished.
        sets: the dev sets.

    Returns:
        The choices for those of the rows that are finished, by the row's name.
    """
    choices, finished = read_choices(place), []
    setting = {"seed": cells[0].seed, "sets": list(sets)} if cells else {}
    for row in dict.fromkeys(cell.row.name for cell in cells):
        scores = {
            cell.rate: _mean(cell.results(sets, "dev"), sets)
            for cell in cells
            if cell.row.name == row
        }
        if None in scores.values():
            continue
        finished.append(row)
        before = choices.get(row, {})
        if setting.items() <= before.items():
            scores = {float(rate): score for rate, score in before["mIoU"].items()} | scores
        best = max(sorted(scores), key=scores.__getitem__)  # of equals the smallest
        choices[row] = {
            "rate": best,
            **setting,
            "mIoU": {str(rate): scores[rate] for rate in sorted(scores)},
        }
    place.mkdir(parents=True, exist_ok=True)
    with whole_file(place / "choices.json") as temporary:
        temporary.write_text(json.dumps(choices, indent=2) + "\n")
    return {row: choices[row] for row in finished}


def _mean(results: Mapping[str, Any] | None, sets: Sequence[str]) -> float | None:
    if results is None:
        return None
    scores = all_scores(results)
    return float(np.mean([scores[name] for name in sets]))


def describe(row: str, choice: Mapping[str, Any]) -> str:
    """One line: what was chosen, from what, and whether it lies at the edge of what was tried."""
    tried = {float(rate): score for rate, score in choice["mIoU"].items()}
    scores = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in tried.items())
    at_edge = len(tried) > 1 and choice["rate"] in (min(tried), max(tried))
    edge = "; at the edge, more values may be better" if at_edge else ""
    return f"{row}: {choice['rate']:g} of {scores}{edge}"


def require_unseen(place: Path, rows: Sequence[str]) -> None:
    """Refuses to choose again what the test sets were looked at with.

    Raises:
        ValueError: names the rows.
    """
    seen = [row for row in rows if any(place.glob(f"{row}@*/{TEST}/results.json"))]
    if seen:
        raise ValueError(
            f"the test sets were looked at with the chosen rates of {', '.join(seen)} in {place}: "
            "these stand; a new search needs another --output"
        )
