"""Reads the folder that a training wrote, without running anything.

Reports, tables, exports and predictions read a run through :class:`Run`, and its scores through
:class:`Results`. :func:`require_same_protocol` alone decides whether scores can be compared.
"""

import json
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml

from fishertune_d2.config import default_config
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.data.protocols import fitting_protocol
from fishertune_d2.evaluation.label_pictures import find_pictures
from fishertune_d2.fisher import FisherEstimate, Selection
from fishertune_d2.fisher.score import OPTIONS

# Facts of a protocol that say which entry of a comparison a run is.
ENTRY = ("method", "feature_perturbation", "ema", "commit")
# Keys that say what a method selects and how that moves, by their names in labels.
_VARIANTS = {
    "unit": "TUNING.UNIT",
    "allocation": "TUNING.ALLOCATION",
    "steps": "TUNING.STEPS",
    "shift": "FISHER.PERTURB.KIND",
}
# Facts of a protocol that say how long a run trained.
LENGTH = ("iterations", "warmup_iterations", "batch_size")
# Facts of a protocol that are recorded for each data set.
_BY_SET = ("test_size", "classes", "label_map")
# Packages in the environment that Detectron2 logs; GPUs are shown too.
_VERSIONS = ("Python", "PyTorch", "torchvision", "detectron2", "numpy", "fvcore", "Pillow", "cv2")
_DAMAGED = (
    "{} is not a file that an evaluation wrote ({}: {}): delete it, or evaluate again with "
    "train_net.py --eval-only"
)


class RunError(ValueError):
    """A folder or a file that no run wrote; the message names it and the remedy."""


@dataclass(frozen=True)
class Results:
    """The content of a ``results.json``.

    Attributes:
        place: the file, for messages.
        source: mIoU in percent of each test set of the source domain.
        targets: mIoU in percent of each test set of an unseen domain.
        target_average: the mean of ``targets``; None if there are none.
        per_class: IoU in percent, by test set and class.
        protocol: how the run was trained and scored; earlier versions recorded fewer facts.
        backbone_parameters: the number of weights of the backbone.
        tuned_parameters: how many of them were tuned, or added to it; None if that is not known.
        failed: why a test set could not be scored, by its name.
    """

    place: str
    source: Mapping[str, float]
    targets: Mapping[str, float]
    target_average: float | None
    per_class: Mapping[str, Mapping[str, float]]
    protocol: Mapping[str, Any]
    backbone_parameters: int
    tuned_parameters: int | None
    failed: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, file: str | Path) -> "Results":
        """Reads a ``results.json``; a missing or damaged one raises a RunError."""
        file = Path(file)
        if not file.is_file():
            raise RunError(f"there is no {file}: its run is not scored yet")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RunError(_DAMAGED.format(file, type(error).__name__, error)) from error
        return cls.of(content, str(file))

    @classmethod
    def of(cls, content: Mapping[str, Any], place: str) -> "Results":
        """Checks the content of a ``results.json``; a RunError names ``place`` if it is damaged."""
        names = [each.name for each in fields(cls) if each.name not in ("place", "failed")]
        try:
            found = {name: content[name] for name in names}
            results = cls(place, **found, failed={**content.get("failed", {})})
            numbers = [*results.scores.values(), results.backbone_parameters]
            numbers += [
                n for n in (results.tuned_parameters, results.target_average) if n is not None
            ]
            for name in results.scores:
                ious = results.per_class[name]
                numbers += [ious.get(label, 0) for label in results.protocol["classes"][name]]
        except (KeyError, TypeError, AttributeError) as error:
            raise RunError(_DAMAGED.format(place, type(error).__name__, error)) from error
        if not all(isinstance(number, int | float) for number in numbers):
            raise RunError(_DAMAGED.format(place, "TypeError", "a score is no number"))
        return results

    @property
    def scores(self) -> dict[str, float]:
        """MIoU in percent of every test set, those of the source first."""
        return {**self.source, **self.targets}

    @property
    def protocol_name(self) -> str:
        """The recorded name of the protocol, else the only name that fits; "" if there is none."""
        recorded = self.protocol.get("name")
        return recorded or fitting_protocol(
            self.protocol.get("test_size", {}),
            self.protocol.get("halved_labels", ()),
            self.protocol.get("class_rule"),
        )

    @property
    def seed(self) -> int:
        """The seed of the training."""
        return self.protocol["seed"]

    @property
    def commit(self) -> str:
        """The commit that scored the run."""
        return self.protocol.get("commit") or "unknown"


def require_same_protocol(
    results: Sequence[Results], *, vary: Collection[str], sets: Sequence[str] | None = None
) -> None:
    """Refuses to compare scores of different protocols.

    A fact is compared only if both runs recorded it; earlier versions recorded fewer.

    Args:
        results: the runs to compare.
        vary: facts of the protocol that may differ, such as :data:`ENTRY` and ``"seed"``.
        sets: the test sets to compare; None requires that all runs have the same test sets.

    Raises:
        ValueError: names two runs that differ, and the facts in which they do.
    """
    known: dict[str, tuple[Any, Results]] = {}  # a value, and the first run that recorded it
    for run in results:
        facts = _comparable(run, vary, sets)
        if sets is None:
            facts["test sets"] = list(run.scores)
        differing = [key for key in facts if key in known and known[key][0] != facts[key]]
        if differing:
            first = known[differing[0]][1]
            one, two = known.get("name", ("", first))[0], facts.get("name", "")
            names = {"name": f"the protocol's name ({two} and {one})"}
            raise ValueError(
                f"{run.place} and {first.place} have different protocols or data: they differ in "
                f"{', '.join(names.get(key, key) for key in differing)}. Compare runs that are "
                "alike, or score one of them again"
            )
        known = {key: (value, run) for key, value in facts.items()} | known


def _comparable(
    results: Results, vary: Collection[str], sets: Sequence[str] | None
) -> dict[str, Any]:
    """The known facts of a protocol that must not differ, those of each test set by themselves."""
    protocol = {"precision": "float32", **results.protocol}  # earlier versions had no other
    halved = protocol.pop("halved_labels", None)
    by_set = {key: protocol.pop(key, {}) for key in _BY_SET}
    facts = {k: v for k, v in protocol.items() if k not in vary and v is not None}
    for name in results.scores if sets is None else sets:
        facts |= {f"{key} of {name}": by_set[key][name] for key in _BY_SET if name in by_set[key]}
        if halved is not None:
            facts[f"halved labels of {name}"] = name in halved
    return facts


@dataclass(frozen=True)
class Run:
    """A folder that a training wrote, finished or not. Each part is read when it is asked for.

    Attributes:
        folder: the run's OUTPUT_DIR.
    """

    folder: Path

    @classmethod
    def read(cls, folder: str | Path) -> "Run":
        """The former way to read a folder, which checks its files at once."""
        warnings.warn("Run.read(folder) is now Run(Path(folder))", FutureWarning, stacklevel=2)
        run = cls(Path(folder))
        _ = run.config, run.results
        return run

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.folder.resolve().name

    @property
    def checkpoint(self) -> Path:
        """The trained model's file; it exists once training has finished."""
        return self.folder / "model_final.pth"

    @property
    def best_checkpoint(self) -> Path:
        """The checkpoint with the highest mIoU on TEST.BEST_ON, if that key names a data set."""
        return self.folder / "model_best.pth"

    @property
    def config_file(self) -> Path:
        """The file with the run's whole config."""
        return self.folder / "config.yaml"

    @property
    def results_file(self) -> Path:
        """The file with the run's scores; it exists once the run is scored."""
        return self.folder / "results.json"

    @property
    def estimate_file(self) -> Path:
        """The file with the Fisher estimate; it exists if the run's method estimates."""
        return self.folder / "fisher.safetensors"

    @property
    def selection_file(self) -> Path:
        """The file with the ranked choice of weights; it exists if the run's method selects."""
        return self.folder / "selection.safetensors"

    def load_estimate(self) -> FisherEstimate:
        """Loads F(x) and F(x'). A run that estimated nothing raises a RunError."""
        return FisherEstimate.load(self._require(self.estimate_file, "estimated"))

    def load_selection(self) -> Selection:
        """Loads the ranked choice of weights. A run that selected nothing raises a RunError."""
        return Selection.load(self._require(self.selection_file, "selected"))

    @property
    def score_options(self) -> dict[str, Any]:
        """The options of DRF with which the run selected, for ``domain_related_fisher``."""
        try:
            return {name: self.config[f"FISHER.{name.upper()}"] for name in OPTIONS}
        except RunError:
            return {}  # apply_fishertune, which scores with the defaults, writes no config

    @cached_property
    def config_text(self) -> str:
        """The text of ``config.yaml``."""
        if not self.config_file.is_file():
            raise RunError(f"there is no {self.config_file}: name the OUTPUT_DIR of a run")
        try:
            return self.config_file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise RunError(f"{self.config_file} is no config of a run: {error}") from error

    @cached_property
    def config(self) -> Mapping[str, Any]:
        """All keys and their values, by key with dots; defaults where the file lacks a key.

        The config may be of any version: keys that this version does not know stay in it.
        """
        return _defaults() | self._written

    @property
    def changed(self) -> dict[str, Any]:
        """The keys and values that differ from the defaults."""
        defaults = _defaults()
        return {k: v for k, v in self._written.items() if k not in defaults or v != defaults[k]}

    @cached_property
    def _written(self) -> dict[str, Any]:
        try:
            written = dict(dotted_items(yaml.safe_load(self.config_text)))
        except (yaml.YAMLError, AttributeError) as error:
            raise RunError(f"{self.config_file} is no config of a run: {error}") from error
        for key in ("SOLVER.MAX_ITER", "TUNING.WARMUP_ITERS"):
            if not isinstance(written.get(key, 0), int):
                raise RunError(
                    f"{self.config_file}: {key} is {written[key]!r}, no number of iterations"
                )
        return written

    @cached_property
    def metrics(self) -> Mapping[int, Mapping[str, float]]:
        """Numbers that training logged, by iteration (ascending) and name.

        Where a resumed run logged an iteration twice, the later numbers count.
        """
        metrics: dict[int, dict[str, float]] = {}
        file = self.folder / "metrics.json"
        text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                iteration = entry.pop("iteration")
            except (ValueError, KeyError, AttributeError, TypeError):
                continue  # a kill cut the line off
            numbers = {k: v for k, v in entry.items() if isinstance(v, int | float)}
            if isinstance(iteration, int):
                metrics.setdefault(iteration, {}).update(numbers)
        return dict(sorted(metrics.items()))

    def series(self, key: str) -> list[tuple[int, float]]:
        """The iterations and values of one number that training logged."""
        return [(i, numbers[key]) for i, numbers in self.metrics.items() if key in numbers]

    def score_series(self) -> dict[str, list[tuple[int, float]]]:
        """Reads the scores of all evaluations in training.

        Returns:
            The iterations done and the mIoU in percent of each evaluation, by data set.
        """
        end, last = "/sem_seg/mIoU", sys.maxsize
        if self.config_file.is_file():  # only train_net.py writes it
            last = self.config["SOLVER.MAX_ITER"]
        names = dict.fromkeys(key for numbers in self.metrics.values() for key in numbers)
        # Detectron2 logs the evaluation at the end with MAX_ITER, the others one iteration earlier.
        return {
            key.removesuffix(end): [(min(i + 1, last), score) for i, score in self.series(key)]
            for key in names
            if key.endswith(end)
        }

    @cached_property
    def results(self) -> Results | None:
        """The run's scores; None if it is not scored yet. A damaged file raises a RunError."""
        return Results.read(self.results_file) if self.results_file.is_file() else None

    @property
    def trained(self) -> bool:
        """Whether training has finished."""
        last = self.config["SOLVER.MAX_ITER"] - 1
        return self.checkpoint.is_file() or max(self.metrics, default=-1) >= last

    @property
    def versions(self) -> dict[str, str]:
        """Versions of packages and names of GPUs, as last logged; empty without a log."""
        log = self.folder / "log.txt"
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
        _, found, table = text.rpartition("Environment info:\n")
        versions: dict[str, str] = {}
        for line in table.splitlines()[1:] if found else ():
            if line.startswith("---"):
                break
            name, _, value = line.partition("  ")
            if name in _VERSIONS or name.startswith("GPU"):
                # Without the compiler that built it, and its folder.
                versions[name] = re.split(r" @| \(main|: torch", value.strip())[0]
        return versions

    def pictures(self, data_set: str) -> list[Path]:
        """The pictures of a data set, in their order."""
        return find_pictures(self.folder, data_set)

    def _require(self, file: Path, did: str) -> Path:
        if not file.is_file():
            raise RunError(f"there is no {file.name} in {self.folder}: its run {did} nothing")
        return file


def variant(config: Mapping[str, Any]) -> str:
    """What tells a run from others of its method, to append to its label; "" for the defaults.

    Args:
        config: the run's keys by name with dots, not necessarily all.

    Returns:
        A text such as ", unit neuron, shift night".
    """
    defaults = _defaults()
    values = {name: config.get(key, defaults[key]) for name, key in _VARIANTS.items()}
    changed = {name: v for name, v in values.items() if v != defaults[_VARIANTS[name]]}
    return "".join(f", {name} {value}" for name, value in changed.items())


@cache
def _defaults() -> dict[str, Any]:
    # As text, because a run's config is read from text, which turns tuples into lists.
    return dict(dotted_items(yaml.safe_load(default_config().dump())))
