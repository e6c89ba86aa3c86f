"""Means over seeds, differences with confidence intervals, and how tables show them."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from tabulate import tabulate

CONFIDENCE = 0.95


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """Returns the mean and the standard deviation of a sample (n - 1), None for a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A difference between two methods, taken seed by seed.

    Attributes:
        pairs: The number of seeds that both have.
        mean: The mean difference.
        low: The lower end of the 95 % confidence interval (Student's t); None for a single pair.
        high: The upper end of the interval.
    """

    pairs: int
    mean: float
    low: float | None = None
    high: float | None = None


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Subtracts their scores from ours, over the seeds that both have.

    Args:
        ours: Our score of each seed.
        theirs: Their score of each seed.

    Returns:
        The difference; None if no seed is common.
    """
    differences = [ours[seed] - theirs[seed] for seed in ours if seed in theirs]
    if not differences:
        return None
    mean, std = mean_and_std(differences)
    n = len(differences)
    if std is None:
        return Difference(n, mean)
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, n - 1)) * std / np.sqrt(n)
    return Difference(n, mean, float(mean - half), float(mean + half))


def format_mean(values: Sequence[float]) -> str:
    """Formats ``mean ± standard deviation`` of a sample; a single value stands alone."""
    mean, std = mean_and_std(values)
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def format_difference(difference: Difference | None) -> str:
    """Formats ``mean [low, high]`` with signs, or ``mean (one seed)``, or a dash for None."""
    if difference is None:
        return "-"
    if difference.low is None or difference.high is None:
        return f"{difference.mean:+.2f} (one seed)"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"


def format_weights(counts: Iterable[int]) -> str:
    """Formats numbers of weights in millions."""
    return ", ".join(f"{count / 1e6:.2f} M" for count in counts)


def markdown_table(lines: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    """Formats a table in Markdown, with numbers as they are written."""
    return tabulate(lines, headers, tablefmt="github", disable_numparse=True)
