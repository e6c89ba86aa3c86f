"""The share of the backbone that is tuned, as a pure function of progress (Eq. 16)."""

import math
import warnings
from functools import cache

# Schedules that once had another name: old name to new name.
RENAMED_SCHEDULES = {"text": "growing"}


def tuned_share(
    progress: float,
    d_min: float,
    d_max: float,
    *,
    schedule: str = "growing",
    form: str | None = None,
) -> float:
    """The share of the backbone that is tuned at a point of the tuning stage.

    Args:
        progress: t / T, from 0 (first iteration of the stage) to 1 (last).
        d_min: share at the start, in [0, 1].
        d_max: share at the end, in [0, 1], at least ``d_min``.
        schedule: ``"growing"`` (once called ``"text"``), the growth that the paper's text
            describes: d_min at the start, d_max at the end, fast at first. ``"eq16"``, the printed
            threshold d_min + (d_max - d_min) e^(-t/T) taken literally: a weight is tuned if its
            score is above this quantile. So the tuned share is 1 - threshold, and d_min and d_max
            are quantiles (0.95 and 0.99 tune 1 % to 3.5 %). ``"linear"``, from d_min to d_max.
            ``"constant"``, d_max throughout.
        form: the former name of ``schedule``.

    Returns:
        A share in [0, 1] that never falls as ``progress`` grows.

    Raises:
        ValueError: if an argument is out of its range, or ``schedule`` is unknown.
    """
    if form is not None:
        _warn_once("the argument form of tuned_share is now called schedule")
        schedule = form
    if schedule in RENAMED_SCHEDULES:
        new = RENAMED_SCHEDULES[schedule]
        _warn_once(f"the schedule {schedule!r} (TUNING.SCHEDULE) is now called {new!r}")
        schedule = new
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1]: got {progress}")
    if not 0.0 <= d_min <= d_max <= 1.0:
        raise ValueError(f"need 0 <= d_min <= d_max <= 1: got d_min {d_min}, d_max {d_max}")
    if schedule not in _SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}: choose from {sorted(_SCHEDULES)}")
    return _SCHEDULES[schedule](progress, d_min, d_max)


@cache
def _warn_once(message: str) -> None:
    warnings.warn(message, FutureWarning, stacklevel=3)


def _between(d_min: float, d_max: float, fraction: float) -> float:
    # min: the sum may exceed d_max by a rounding.
    return min(d_min + (d_max - d_min) * fraction, d_max)


_SCHEDULES = {
    "growing": lambda t, lo, hi: _between(lo, hi, (1.0 - math.exp(-t)) / (1.0 - math.exp(-1.0))),
    "eq16": lambda t, lo, hi: 1.0 - _between(lo, hi, math.exp(-t)),  # Eq. 16
    "linear": lambda t, lo, hi: _between(lo, hi, t),
    "constant": lambda t, lo, hi: hi,
}
