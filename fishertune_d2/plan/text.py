"""Formats a plan as tables, and as one sentence for the head of a config."""

from collections.abc import Mapping, Sequence

from tabulate import tabulate

from .costs import Plan
from .hours import not_counted, seconds
from .stage_costs import Stage

TITLES = {
    "warmup": "warm-up",
    "estimation": "estimation",
    "tuning": "tuning",
    "evaluation": "evaluation",
}
GB = 2**30  # the unit of GPU makers


def summary(plan: Plan) -> str:
    """The sentence about costs in a config's head."""
    first, *others = plan.stages
    tuning = plan.stages[-1]
    memory = [f"{first.memory.total / GB:.1f} GB of memory in {TITLES[first.name]}"]
    memory += [f"{stage.memory.total / GB:.1f} in {TITLES[stage.name]}" for stage in others]
    return (
        f"Costs, with {tuning.images} images of {_pixels(plan.size)}: {tuning.flops / 1e12:.2f} "
        f"TFLOP (multiply-adds) a {TITLES[tuning.name]} step, and at least {', '.join(memory)}."
    )


def format_plan(plan: Plan) -> str:
    """The tables that the command prints."""
    images = " and ".join(str(n) for n in sorted({stage.images for stage in plan.stages}))
    title = (
        f"{plan.method} on {plan.vfm}: batches of {images} images of {_pixels(plan.size)}, one "
        f"process on {plan.device}"
    )
    parts = [title, _parameters(plan), _compute(plan)]
    parts += [_inference(plan)] if plan.inference else []
    return "\n\n".join([*parts, _memory(plan), _files(plan)])


def format_fit(plan: Plan, gigabytes: float) -> tuple[bool, str]:
    """Says whether every stage fits a card, as far as the plan counts memory.

    Args:
        plan: the plan.
        gigabytes: the card's memory, in GB of 2^30 bytes.

    Returns:
        Whether it fits, and the sentence to print.
    """
    too_large = [stage for stage in plan.stages if stage.memory.total > gigabytes * GB]
    if too_large:
        needs = ", ".join(f"{TITLES[s.name]} ({_gb(s.memory.total)} GB)" for s in too_large)
        return False, f"Does not fit a card of {gigabytes:g} GB: {needs}."
    largest = max(plan.stages, key=lambda stage: stage.memory.total)
    left = gigabytes * GB - largest.memory.total
    return True, (
        f"Fits a card of {gigabytes:g} GB, if what is not counted stays below {_gb(left)} GB in "
        f"the largest stage, {TITLES[largest.name]}."
    )


def format_hours(plan: Plan, rates: Mapping[str, float]) -> str:
    """The table of hours.

    Args:
        plan: the plan.
        rates: TFLOP a second, for each stage and for "evaluation".

    Returns:
        The table, and the parts of a run that it leaves out.
    """
    found = seconds(plan, rates)
    lines = [[TITLES[name], f"{rates[name]:.3g}", _hours(s)] for name, s in found.items()]
    lines.append(["all", "", _hours(sum(found.values()))])
    notes = [
        _table(lines, ["time", "TFLOP a second", "hours"]),
        "In one process that has the machine to itself. Evaluations of all test sets: "
        f"{plan.evaluations}.",
        *not_counted(plan),
    ]
    return "\n".join(notes)


def _parameters(plan: Plan) -> str:
    backbone = plan.parameters["backbone"]
    inside = {"model", "decoder"}
    lines = [
        [name, f"{n / 1e6:.2f} M", "" if name in inside else f"{100 * n / backbone:.2f} %"]
        for name, n in plan.parameters.items()
    ]
    return _table(lines, ["parameters", "number", "of the backbone"])


def _compute(plan: Plan) -> str:
    lines = [
        [TITLES[s.name], s.steps, s.images, f"{s.flops / 1e12:.2f}", f"{_all(s) / 1e15:.3g}"]
        for s in plan.stages
    ]
    lines.append(["all", "", "", "", f"{sum(map(_all, plan.stages)) / 1e15:.3g}"])
    table = _table(lines, ["FLOPs", "steps", "batch", "TFLOP a step", "PFLOP in all"])
    notes = [
        table,
        "One multiply-add is one FLOP. Counted are matrix products, convolutions and attention,",
        "forward and backward. Estimation passes over a batch and over its shift.",
    ]
    if plan.uncounted:
        names = ", ".join(f"{name} ({n} times)" for name, n in sorted(plan.uncounted.items()))
        notes.append(f"NOT counted, though they may matter: {names}.")
    return "\n".join(notes)


def _inference(plan: Plan) -> str:
    lines = [
        [
            ", ".join(each.names),
            _pixels(each.size) if each.size else "?",
            f"{each.windows} of {_pixels(each.window)}",
            f"{each.windows * each.flops.forward / 1e12:.2f}",
        ]
        for each in plan.inference
    ]
    return _table(lines, ["test sets", "at most", "passes", "TFLOP an image"])


def _memory(plan: Plan) -> str:
    names = ["weights", "gradients", "optimizer", "activations", "fisher", "selection"]
    names += ["averages"] if any(stage.memory.averages for stage in plan.stages) else []
    names.append("total")
    lines = [
        [TITLES[s.name], *(_gb(getattr(s.memory, name)) for name in names)] for s in plan.stages
    ]
    return "\n".join(
        [
            _table(lines, ["memory in GB", *names[:-1], "at least"]),
            "1 GB is 2^30 bytes. Counted at the end of a forward pass, with every class in every",
            "image. Not counted: short-lived tensors, fragmentation, the device's libraries.",
        ]
    )


def _files(plan: Plan) -> str:
    lines = [[name, _gb(size)] for name, size in plan.files.items()]
    lines.append(["all", _gb(sum(plan.files.values()))])
    return "\n".join(
        [
            _table(lines, ["files", "GB"]),
            f"After the run, with {plan.kept} periodic checkpoints: SOLVER.CHECKPOINT_PERIOD and",
            "SOLVER.KEEP_CHECKPOINTS say how many. While one is written, there is one more.",
        ]
    )


def _table(lines: Sequence[Sequence[object]], headers: Sequence[str]) -> str:
    aligned = ["left", *["right"] * (len(headers) - 1)]
    return tabulate(lines, headers, colalign=aligned, disable_numparse=True)


def _all(stage: Stage) -> int:
    return stage.steps * stage.flops


def _hours(number: float) -> str:
    return f"{number / 3600:.2f}"


def _gb(size: float) -> str:
    return f"{size / GB:.2f}"


def _pixels(size: tuple[int, int]) -> str:
    """Formats (height, width) as width x height."""
    return f"{size[1]} x {size[0]}"
