"""The hours that the cells of a table take, by the plan of each."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from tabulate import tabulate
from tqdm import tqdm

from fishertune_d2.config import read_config
from fishertune_d2.plan import make_plan
from fishertune_d2.plan.hours import seconds, unknown_sets

from .cells import Cell


def format_hours(
    cells: Sequence[Cell], sets: Sequence[str], rates: Mapping[str, float], trained: bool
) -> str:
    """Plans the cells, and sums up their hours by foundation model and entry.

    Seeds and learning rates change no cost, so cells that differ in nothing else share a plan.

    Args:
        cells: the cells that will run.
        sets: the data sets on which each is scored.
        rates: TFLOP a second, for each stage and for "evaluation".
        trained: whether the cells are trained already, and are only scored.

    Returns:
        The table, and the test sets that it leaves out.
    """
    known: dict[tuple[str, str, frozenset], float] = {}
    counts: Counter[tuple[str, str]] = Counter()
    hours: defaultdict[tuple[str, str], float] = defaultdict(float)
    unknown: list[str] = []
    for cell in tqdm(cells, desc="planning", unit="cell", leave=False):
        row = cell.vfm, cell.entry.name
        key = (*row, frozenset(cell.takes))
        if key not in known:
            _, file, _, *options = cell.arguments(sets)  # --config-file FILE --resume KEY VALUE ...
            plan = make_plan(read_config(file, options))
            found, unknown = seconds(plan, rates), unknown_sets(plan)
            once = found["evaluation"] / plan.evaluations
            known[key] = (once if trained else sum(found.values())) / 3600
        counts[row] += 1
        hours[row] += known[key]
    lines = [[*row, str(counts[row]), f"{hours[row]:.2f}"] for row in counts]
    lines.append(["all", "", str(counts.total()), f"{sum(hours.values()):.2f}"])
    notes = ["One cell at a time, in one process. With --jobs N on N cards, divide by N."]
    if unknown:
        notes.append(f"NOT counted, for their number of images is not known: {', '.join(unknown)}.")
    table = tabulate(lines, ["VFM", "entry", "cells", "hours"], disable_numparse=True)
    return "\n".join([table, *notes])
