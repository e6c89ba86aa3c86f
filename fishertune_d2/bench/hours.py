"""The hours that the cells of a table take, by the plan of each."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

from tabulate import tabulate
from tqdm import tqdm

from fishertune_d2.config import read_config
from fishertune_d2.plan import make_plan
from fishertune_d2.plan.hours import not_counted, seconds

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
    left_out: list[str] = []  # the same for all cells, which share their test sets
    for cell in tqdm(cells, desc="planning", unit="cell", leave=False):
        line = cell.vfm, cell.entry.name
        key = (*line, frozenset(cell.takes))
        if key not in known:
            _, file, _, *options = cell.arguments(sets)  # --config-file FILE --resume KEY VALUE ...
            plan = make_plan(read_config(file, options))
            found, left_out = seconds(plan, rates), not_counted(plan)
            once = found["evaluation"] / plan.evaluations
            known[key] = (once if trained else sum(found.values())) / 3600
        counts[line] += 1
        hours[line] += known[key]
    lines = [[*line, str(counts[line]), f"{hours[line]:.2f}"] for line in counts]
    lines.append(["all", "", str(counts.total()), f"{sum(hours.values()):.2f}"])
    note = "One cell at a time, in one process. With --jobs N on N cards, divide by N."
    table = tabulate(lines, ["VFM", "entry", "cells", "hours"], disable_numparse=True)
    return "\n".join([table, note, *left_out])
