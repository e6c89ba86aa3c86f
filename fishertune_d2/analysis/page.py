"""Writes the page about a run. The template escapes all text that comes from the run's files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from fishertune_d2.analysis.selection_map import draw_selection_map
from fishertune_d2.analysis.sensitivity_map import draw_sensitivity_map
from fishertune_d2.data.protocols import PROTOCOLS
from fishertune_d2.files import whole_file
from fishertune_d2.run import Run

from .page_figures import draw_curves, draw_map, read_picture


def write_report(run: Run, path: str | Path) -> None:
    """Writes the page, which needs no other file and no network.

    Args:
        run: The run, finished or not.
        path: The HTML file. An OSError names it if it cannot be written.
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
    """Returns a fact of the training, from results.json if it is there, else from the config."""
    recorded = run.results.protocol if run.results else {}
    return recorded[fact] if fact in recorded else run.config[key]


def _iterations_done(run: Run) -> int:
    """Counts the logged iterations. Training logs every 20th, so the count may be 19 too low."""
    return max((i + 1 for i, numbers in run.metrics.items() if "total_loss" in numbers), default=0)


def _scores(run: Run) -> dict[str, Any] | None:
    """Returns the numbers of the table of scores, source first; None if the run has no scores."""
    results = run.results
    if results is None:
        return None
    scores, per_class = results.scores, results.per_class
    classes = dict.fromkeys(label for name in scores for label in results.protocol["classes"][name])
    source = [] if results.failed else list(results.source.values())
    return {
        "columns": [(name, name in results.source) for name in scores],
        "miou": list(scores.values()),
        "classes": [(label, [per_class[name].get(label) for name in scores]) for label in classes],
        "source": sum(source) / len(source) if source else None,
        # An average over fewer data sets than in other runs would not compare with theirs.
        "unseen": None if results.failed else results.target_average,
        "unseen_count": len(results.targets),
    }


def _pictures(run: Run) -> list[tuple[str, list[tuple[dict[str, str], str]]]]:
    """Returns each data set that has pictures, with them."""
    found = [(name, run.pictures(name)) for name in run.config["DATASETS.TEST"]]
    return [(name, [read_picture(path) for path in paths]) for name, paths in found if paths]


def _maps(run: Run) -> list[dict[str, str]]:
    """Draws the Fisher information and the selection, if the run's method has them."""
    maps = []
    if run.estimate_file.is_file():
        text = (
            "The mean Fisher information of each group of weights, divided by the mean over all "
            "candidate weights, so that 1 is average. F is measured on the source images; DRF "
            "also counts how much F changes under a simulated shift."
        )

        def draw(path: Path) -> None:
            draw_sensitivity_map([(run.name, run.load_estimate())], path, [run.score_options])

        maps.append({"title": "Sensitivity", "text": text, **_draw(draw)})
    if run.selection_file.is_file():
        text = "The percentage of each group's weights that trains at the end of the training."
        drawn = _draw(lambda path: draw_selection_map(run.load_selection(), path))
        maps.append({"title": "Selection", "text": text, **drawn})
    return maps


def _draw(draw: Callable[[Path], None]) -> dict[str, str]:
    try:
        return {"uri": draw_map(draw)}
    except ValueError as error:  # the file is damaged or has no F(x'); the page shows the rest
        return {"trouble": str(error)}


def _protocol(run: Run) -> dict[str, str]:
    """Returns how the run was trained and scored, from results.json if it exists, else planned."""
    config = run.config
    recorded = dict(run.results.protocol) if run.results else {}
    sizes = recorded.pop("test_size", {})
    for listed in ("classes", "label_map", "method", "name", "vfm", "train"):
        recorded.pop(listed, None)
    named = PROTOCOLS.get(config["TEST.PROTOCOL"])
    planned = {
        "mode": config["TEST.MODE"],
        "class_rule": named.class_rule if named else config["TEST.CLASS_RULE"],
        "seed": config["SEED"],
        "iterations": config["SOLVER.MAX_ITER"],
        "warmup_iterations": config["TUNING.WARMUP_ITERS"],
        "batch_size": config["SOLVER.IMS_PER_BATCH"],
    }
    name = run.results.protocol_name if run.results else config["TEST.PROTOCOL"]
    facts = {"protocol": name} if name else {}
    facts |= {"trained on": _recorded(run, "train", "DATASETS.TRAIN")}
    facts |= {name.replace("_", " "): value for name, value in (recorded or planned).items()}
    facts |= {
        f"test size, {name}": f"{size[0]} x {size[1]}" if size else "as stored"
        for name, size in sizes.items()
    }
    return {name: _text(value) for name, value in facts.items() if value != []}


def _text(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_text, value))
    return "not recorded" if value is None else str(value)
