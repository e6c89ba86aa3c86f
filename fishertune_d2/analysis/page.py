"""Puts the page together. All text is escaped by the template, whatever the run's files hold."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fishertune_d2.analysis.selection_map import draw_selection_map
from fishertune_d2.analysis.sensitivity_map import draw_sensitivity_map
from fishertune_d2.files import whole_file
from fishertune_d2.run import Run

from .page_figures import draw_curves, draw_map, shrink


@dataclass(frozen=True)
class Map:
    """A map of the backbone's weights, block by kind.

    Attributes:
        title: what it shows.
        text: how to read it.
        uri: the picture; empty if it could not be drawn.
        trouble: why not.
    """

    title: str
    text: str
    uri: str
    trouble: str


def write_report(run: Run, path: str | Path) -> None:
    """Writes the page.

    Args:
        run: finished or not.
        path: the HTML file; it needs no other one, and no network.

    Raises:
        OSError: if it cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("fishertune_d2.analysis", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html").render(
        run=run,
        method=_recorded(run, "method", "TUNING.METHOD") or "unknown method",
        vfm=run.config["MODEL.VFM.NAME"],
        warmup_of=run.config["TUNING.WARMUP_CHECKPOINT"],
        done=_iterations_done(run),
        scores=_scores(run),
        pictures=_pictures(run),
        curves=draw_curves(run),
        maps=_maps(run),
        protocol=_protocol(run),
    )
    with whole_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8")


def _recorded(run: Run, fact: str, key: str) -> Any:
    """A fact of the training: of results.json, which has it from the checkpoint, or the config."""
    recorded = run.results.protocol if run.results else {}
    return recorded[fact] if fact in recorded else run.config[key]


def _iterations_done(run: Run) -> int:
    """How many iterations the log holds; what is written every 20th may fall short by 19."""
    return max((i + 1 for i, numbers in run.metrics.items() if "total_loss" in numbers), default=0)


def _scores(run: Run) -> dict[str, Any] | None:
    """The results as rows of a table, source first; None if there are none."""
    results = run.results
    if results is None:
        return None
    scores, per_class = results.scores, results.per_class
    classes = dict.fromkeys(label for name in scores for label in results.protocol["classes"][name])
    source = list(results.source.values())
    return {
        "columns": [(name, name in results.source) for name in scores],
        "miou": list(scores.values()),
        "classes": [(label, [per_class[name].get(label) for name in scores]) for label in classes],
        "source": sum(source) / len(source) if source else None,
        "unseen": results.target_average,
        "unseen_count": len(results.targets),
    }


def _pictures(run: Run) -> list[tuple[str, list[str]]]:
    """Data sets that pictures were drawn of, and these."""
    found = [(name, run.pictures(name)) for name in run.config["DATASETS.TEST"]]
    return [(name, [shrink(path) for path in paths]) for name, paths in found if paths]


def _maps(run: Run) -> list[Map]:
    """The maps of what was measured and selected, as far as the run's method does either."""
    maps = []
    if run.estimate_file.is_file():
        maps.append(
            _draw(
                "Sensitivity",
                "The mean Fisher information of each group of weights over that of all candidates, "
                "on the source images (F) and weighed by how it reacts to a simulated shift (DRF). "
                "1 is average.",
                lambda path: draw_sensitivity_map([(run.name, run.load_estimate())], path),
            )
        )
    if run.selection_file.is_file():
        maps.append(
            _draw(
                "Selection",
                "The share of each group's weights that is tuned by the end, in percent.",
                lambda path: draw_selection_map(run.load_selection(), path),
            )
        )
    return maps


def _draw(title: str, text: str, draw: Callable[[Path], None]) -> Map:
    try:
        return Map(title, text, draw_map(draw), "")
    except ValueError as error:  # damaged, or without F(x'); the rest of the page is none the worse
        return Map(title, text, "", str(error))


def _protocol(run: Run) -> dict[str, str]:
    """How the run was trained and scored: what results.json records, before that the config."""
    config = run.config
    recorded = dict(run.results.protocol) if run.results else {}
    sizes = recorded.pop("test_size", {})
    for listed in ("classes", "method", "vfm", "train"):
        recorded.pop(listed, None)
    planned = {
        "mode": config["TEST.MODE"],
        "class_rule": config["TEST.CLASS_RULE"],
        "seed": config["SEED"],
        "iterations": config["SOLVER.MAX_ITER"],
        "warmup_iterations": config["TUNING.WARMUP_ITERS"],
        "batch_size": config["SOLVER.IMS_PER_BATCH"],
    }
    rows = {name.replace("_", " "): value for name, value in (recorded or planned).items()}
    rows = {"trained on": _recorded(run, "train", "DATASETS.TRAIN"), **rows}
    rows |= {
        f"test size, {name}": f"{size[0]} x {size[1]}" if size else "as stored"
        for name, size in sizes.items()
    }
    return {name: _text(value) for name, value in rows.items() if value != []}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "not recorded" if value is None else str(value)
