"""How much of the backbone is tuned, as a pure function of progress (Eq. 16)."""

import math

_RATE = 1.0  # the exponent's rate: Eq. 16 has exp(-t / T), so it reaches exp(-1) at the end


def tuned_share(progress: float, d_min: float, d_max: float, *, form: str = "text") -> float:
    """The share of the backbone that is tuned at a point of the tuning stage.

    Args:
        progress: t / T, from 0 (first iteration of the stage) to 1 (last).
        d_min: share at the start, in [0, 1].
        d_max: share at the end, in [0, 1], at least ``d_min``.
        form: ``"text"``, the growth the paper's text describes: d_min at the start, d_max at the
            end, fast at first. ``"eq16"``, the printed threshold d_min + (d_max - d_min) e^(-t/T)
            read as the share that stays fixed of [d_min, d_max], so the tuned share is
            d_min + (d_max - d_min) (1 - e^(-t/T)): it ends at 63 % of the way. ``"linear"``.
            ``"constant"``: d_max throughout.

    Returns:
        A share in [d_min, d_max] that never falls as ``progress`` grows.

    Raises:
        ValueError: if an argument is out of its range, or ``form`` is unknown.
    """
    if not 0.0 <= progress <= 1.0:
        raise ValueError(f"progress must be in [0, 1]: got {progress}")
    if not 0.0 <= d_min <= d_max <= 1.0:
        raise ValueError(f"need 0 <= d_min <= d_max <= 1: got d_min {d_min}, d_max {d_max}")
    if form not in _FORMS:
        raise ValueError(f"unknown schedule {form!r}: choose from {sorted(_FORMS)}")
    # min: (d_max - d_min) * 1.0 + d_min may exceed d_max by a rounding.
    return min(d_min + (d_max - d_min) * _FORMS[form](progress), d_max)


_FORMS = {
    "text": lambda t: (1.0 - math.exp(-_RATE * t)) / (1.0 - math.exp(-_RATE)),
    "eq16": lambda t: 1.0 - math.exp(-_RATE * t),
    "linear": lambda t: t,
    "constant": lambda t: 1.0,
}
