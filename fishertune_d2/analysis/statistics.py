"""What several seeds say: a mean and its spread, and a difference with its confidence interval."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


def mean_and_std(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean, and the standard deviation of a sample (n - 1); None of a single value."""
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None


@dataclass(frozen=True)
class Difference:
    """A difference between two rows, taken seed by seed.

    Attributes:
        pairs: seeds that both have.
        mean: over the seeds.
        low: lower end of the interval that holds the true mean in 95 of 100 cases, by Student's t;
            None if there is one pair only.
        high: its upper end.
    """

    pairs: int
    mean: float
    low: float | None = None
    high: float | None = None


def paired_difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Difference | None:
    """Our scores minus theirs, over the seeds that both have; None if there is no such seed.

    Args:
        ours: by seed.
        theirs: by seed.
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
    """``mean ± standard deviation`` of a sample; of a single value the value alone."""
    mean, std = mean_and_std(values)
    return f"{mean:.2f}" if std is None else f"{mean:.2f} ± {std:.2f}"


def format_difference(difference: Difference | None) -> str:
    """``mean [low, high]``, with signs; of one pair it says so; without any a dash."""
    if difference is None:
        return "-"
    if difference.low is None:
        return f"{difference.mean:+.2f} (one seed)"
    return f"{difference.mean:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
