"""What a run has written into its OUTPUT_DIR, read without running anything."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from fishertune_d2.config import default_config
from fishertune_d2.evaluation.pictures import find_pictures

# Of what Detectron2 logs about the environment; lines about GPUs are taken too.
_VERSIONS = ("Python", "PyTorch", "torchvision", "detectron2", "numpy", "fvcore", "Pillow", "cv2")


class RunError(ValueError):
    """A folder that a page cannot be made of; the message names the file and the remedy."""


@dataclass(frozen=True)
class Run:
    """A run's files, as far as it has come.

    Attributes:
        folder: its OUTPUT_DIR.
        config_text: config.yaml, whole.
        config: the values in it by key, with dots.
        changed: those of ``config`` that differ from the defaults.
        metrics: what training logged, by iteration, ascending: numbers by name.
        results: results.json; None if the run was not scored.
        trained: whether training came to its end.
        versions: of what it ran on, by name; empty if its log does not say.
    """

    folder: Path
    config_text: str
    config: Mapping[str, Any]
    changed: Mapping[str, Any]
    metrics: Mapping[int, Mapping[str, float]]
    results: Mapping[str, Any] | None
    trained: bool
    versions: Mapping[str, str]

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """Reads a folder.

        Raises:
            RunError: if it is not of a run, or a file in it is damaged.
        """
        folder = Path(folder)
        text, config = _read_config(folder)
        defaults = _defaults()
        metrics = _read_metrics(folder / "metrics.json")
        last = config.get("SOLVER.MAX_ITER", defaults["SOLVER.MAX_ITER"]) - 1
        return cls(
            folder=folder,
            config_text=text,
            config=defaults | config,
            changed={k: v for k, v in config.items() if k not in defaults or v != defaults[k]},
            metrics=metrics,
            results=_read_results(folder / "results.json"),
            trained=(folder / "model_final.pth").is_file() or max(metrics, default=-1) >= last,
            versions=_read_versions(folder / "log.txt"),
        )

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    def series(self, key: str) -> list[tuple[int, float]]:
        """Iterations and values of one number that training logged."""
        return [(i, numbers[key]) for i, numbers in self.metrics.items() if key in numbers]

    def pictures(self, data_set: str) -> list[Path]:
        """The pictures of a data set, in their order."""
        return find_pictures(self.folder, data_set)


def _read_config(folder: Path) -> tuple[str, dict[str, Any]]:
    path = folder / "config.yaml"
    if not path.is_file():
        raise RunError(f"there is no {path}: name the OUTPUT_DIR of a run")
    try:
        text = path.read_text(encoding="utf-8")
        config = flatten(yaml.safe_load(text))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError) as error:
        raise RunError(f"{path} is no config of a run: {error}") from error
    for key in ("SOLVER.MAX_ITER", "TUNING.WARMUP_ITERS"):
        if not isinstance(config.get(key, 0), int):
            raise RunError(f"{path}: {key} is {config[key]!r}, no number of iterations")
    return text, config


def _defaults() -> dict[str, Any]:
    cfg = default_config()
    # Through text, as the run's config went, for that makes lists of tuples.
    return flatten(yaml.safe_load(cfg.dump()))


def flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of a nested config by key, with dots."""
    flat: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _read_metrics(path: Path) -> dict[int, dict[str, float]]:
    """The log by iteration. Of an iteration that was resumed into, the later numbers count."""
    metrics: dict[int, dict[str, float]] = {}
    if not path.is_file():
        return metrics
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            iteration = entry.pop("iteration")
        except (ValueError, KeyError, AttributeError, TypeError):
            continue  # cut off by a kill
        numbers = {k: v for k, v in entry.items() if isinstance(v, int | float)}
        if isinstance(iteration, int):
            metrics.setdefault(iteration, {}).update(numbers)
    return dict(sorted(metrics.items()))


def _read_results(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        scores = results["source"] | results["targets"]
        numbers = [*scores.values(), results["backbone_parameters"]]
        if results["tuned_parameters"] is not None:  # else nothing is known of the training
            numbers.append(results["tuned_parameters"])
        for name in scores:
            ious, classes = results["per_class"][name], results["protocol"]["classes"][name]
            numbers += [ious.get(label, 0) for label in classes]
        if results["target_average"] is not None:
            numbers.append(results["target_average"])
        if not all(isinstance(number, int | float) for number in numbers):
            raise TypeError("a score is no number")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(
            f"{path} is not what an evaluation writes ({type(error).__name__}: {error}): delete "
            "it, or evaluate again with train_net.py --eval-only"
        ) from error
    return results


def _read_versions(log: Path) -> dict[str, str]:
    """The last table of the environment that Detectron2 logged."""
    if not log.is_file():
        return {}
    _, found, table = log.read_text(encoding="utf-8", errors="replace").rpartition(
        "Environment info:\n"
    )
    versions: dict[str, str] = {}
    for line in table.splitlines()[1:] if found else ():
        if line.startswith("---"):
            break
        name, _, value = line.partition("  ")
        if name in _VERSIONS or name.startswith("GPU"):
            # Without the compiler that built it, and the folder that it lies in.
            versions[name] = re.split(r" @| \(main|: torch", value.strip())[0]
    return versions
