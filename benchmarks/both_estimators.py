"""Access to the estimators of x and of x' while an estimate runs."""

from collections.abc import Callable


def keeping_both(make: Callable) -> tuple[list, Callable]:
    """Wraps a function that makes an estimator.

    Returns:
        A list that gets the estimators of x and of x' when an estimate makes them, and the function
        to give to the estimate.
    """
    made: list = []

    def making(candidates):
        made.append(make(candidates))
        fresh = made[0].fresh
        made[0].fresh = lambda: made.append(fresh()) or made[1]
        return made[0]

    return made, making
