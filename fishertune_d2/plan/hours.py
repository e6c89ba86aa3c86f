"""The seconds of a run in one process: the FLOPs of its stages, divided by a machine's rates."""

from collections.abc import Mapping

from fishertune_d2.data.dataset_table import DATASETS

from .costs import Plan


def seconds(plan: Plan, rates: Mapping[str, float]) -> dict[str, float]:
    """Computes the seconds of each stage.

    The start of the process and the ranking of the scores are left out, and test sets whose number
    of images is not published, see :func:`unknown_sets`.

    Args:
        plan: the plan.
        rates: TFLOP a second, for each stage and for "evaluation".

    Returns:
        The seconds of each stage of the plan, and of all its evaluations as "evaluation".
    """
    flops = {stage.name: stage.steps * stage.flops for stage in plan.stages}
    flops["evaluation"] = plan.evaluations * sum(
        _images(name) * tested.windows * tested.flops.forward
        for tested in plan.inference
        for name in tested.names
    )
    return {name: number / 1e12 / rates[name] for name, number in flops.items()}


def unknown_sets(plan: Plan) -> list[str]:
    """The test sets whose number of images is not published."""
    return [name for tested in plan.inference for name in tested.names if not _images(name)]


def not_counted(plan: Plan) -> list[str]:
    """A line that names the test sets that :func:`seconds` leaves out; none if it counts all."""
    names = ", ".join(unknown_sets(plan))
    return [f"NOT counted, for their number of images is not known: {names}."] if names else []


def _images(name: str) -> int:
    """The published number of images of a data set; 0 if there is none."""
    return next((d.published.pairs for d in DATASETS if d.name == name and d.published), 0)
