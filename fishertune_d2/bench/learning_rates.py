"""The search over the backbone's learning rate, the same for every entry.

It chooses the value with the highest mean mIoU on the profile's dev sets, with one seed, and writes
it to ``choices.json`` beside the cells. From a study's table the choices are computed again.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import numpy as np

from fishertune_d2.analysis.study import SEARCH, read_table, split_place
from fishertune_d2.engine.run_keys import as_words, differing_keys
from fishertune_d2.files import whole_file
from fishertune_d2.run import Results

from .cells import DEV, Cell, folder_name, recipe_of
from .tables import RATE, find_entry


class Choice(TypedDict):
    """The chosen learning rate, the seed and data sets of the search, and the mIoU of each rate."""

    rate: float
    seed: int
    sets: list[str]
    mIoU: dict[str, float]


def read_choices(place: Path) -> dict[str, Choice]:
    """Returns the choice for each entry by its name; empty before a search."""
    split = split_place(place)
    if split is not None:
        return _choices_of_table(*split)
    file = place / "choices.json"
    return json.loads(file.read_text()) if file.is_file() else {}


def _choices_of_table(table: Path, below: str) -> dict[str, Choice]:
    """Derives the choices from runs: a search tried several rates with one of the seeds."""
    runs = read_table(table)
    own = [run for run in runs if Path(run.run).is_relative_to(Path(SEARCH, below))]
    tried: dict[str, dict[int, dict[float, Results]]] = {}
    for run in own or [run for run in runs if Path(run.run).is_relative_to(below)]:
        if run.rate is None or run.tested:
            continue
        name = find_entry(run.entry.partition("@")[0]).rate_of
        of_seed = tried.setdefault(name, {}).setdefault(run.seed, {})
        if run.entry == name or run.rate not in of_seed:  # a variant has the rate of its method
            of_seed[run.rate] = run.results(table)
    choices = {}
    for name, by_seed in tried.items():
        seed = max(sorted(by_seed), key=lambda seed: len(by_seed[seed]))
        sets = list(next(iter(by_seed[seed].values())).scores)
        scores = {rate: _mean(results, sets) for rate, results in by_seed[seed].items()}
        choices[name] = _choose(scores, seed, sets)
    return choices


def write_choices(place: Path, cells: Sequence[Cell], sets: Sequence[str]) -> dict[str, Choice]:
    """Chooses for each entry among its finished cells and the rates of earlier searches.

    A search with another seed or other sets than before is refused (:func:`require_same_search`).

    Args:
        place: The folder of a foundation model's cells.
        cells: The cells of one seed, with their rates. The choice of an entry stays as it is until
            all its cells are finished.
        sets: The dev sets.

    Returns:
        The choices of the finished entries, by their names.
    """
    require_same_search(place, cells, sets)
    choices, finished = read_choices(place), []
    for name in dict.fromkeys(cell.entry.name for cell in cells):
        scores = {}
        of_entry = [cell for cell in cells if cell.entry.name == name]
        for cell in of_entry:
            results = cell.results(sets, DEV)
            if results is not None and cell.rate is not None:
                scores[cell.rate] = _mean(results, sets)
        if len(scores) < len(of_entry):
            continue
        finished.append(name)
        if name in choices:
            before = choices[name]["mIoU"]
            scores = {float(rate): score for rate, score in before.items()} | scores
        choices[name] = _choose(scores, of_entry[0].seed, sets)
    place.mkdir(parents=True, exist_ok=True)
    with whole_file(place / "choices.json") as temporary:
        temporary.write_text(json.dumps(choices, indent=2) + "\n")
    return {name: choices[name] for name in finished}


def require_same_search(place: Path, cells: Sequence[Cell], sets: Sequence[str]) -> None:
    """Refuses to mix a search with an earlier one of other images, random numbers or settings.

    Args:
        place: The folder of a foundation model's cells.
        cells: The cells of the search.
        sets: The dev sets.

    Raises:
        ValueError: An entry was searched with another seed, on other sets, or with other values of
            keys that define the training.
    """
    choices = read_choices(place)
    for cell in cells:
        before = choices.get(cell.entry.name)
        if before and (before["seed"], before["sets"]) != (cell.seed, list(sets)):
            raise ValueError(
                f"the search of {cell.entry.name} in {place} used seed {before['seed']} and "
                f"{', '.join(before['sets'])}, and this one uses seed {cell.seed} and "
                f"{', '.join(sets)}: add --seeds {before['seed']}, or name another --output"
            )
        for rate in before["mIoU"] if before else ():
            path = cell.folder.with_name(folder_name(cell.entry, float(rate), cell.seed))
            differing = differing_keys(recipe_of(path), cell.recipe)
            differing.pop(RATE, None)
            if differing:
                raise ValueError(
                    f"{path} was a part of the search with other settings, so its score does not "
                    "compare; restore them, or name another --output:\n  "
                    + "\n  ".join(as_words(differing))
                )


def _choose(scores: Mapping[float, float], seed: int, sets: Sequence[str]) -> Choice:
    best = max(sorted(scores), key=scores.__getitem__)  # the smallest of equals
    ordered = {str(rate): scores[rate] for rate in sorted(scores)}
    return {"rate": best, "seed": seed, "sets": list(sets), "mIoU": ordered}


def _mean(results: Results, sets: Sequence[str]) -> float:
    return float(np.mean([results.scores[name] for name in sets]))


def describe(name: str, choice: Choice) -> str:
    """Returns one line: the chosen rate, all scores, and whether the choice is at the edge."""
    tried = {float(rate): score for rate, score in choice["mIoU"].items()}
    scores = ", ".join(f"{rate:g}: {score:.2f}" for rate, score in tried.items())
    at_edge = len(tried) > 1 and choice["rate"] in (min(tried), max(tried))
    edge = "; at the edge, more values may be better" if at_edge else ""
    return f"{name}: {choice['rate']:g} of {scores}{edge}"
