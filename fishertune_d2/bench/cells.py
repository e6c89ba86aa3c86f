"""The cells of a table: an entry, a foundation model and a seed, with the config to run.

Cells with the same seed, foundation model and relevant settings share one warm-up and one Fisher
estimate. The configs decide whether settings are equal. The first cell that needs one makes it.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from fishertune_d2.analysis.study import TEST, read_results
from fishertune_d2.config import CONFIGS, equal_values, get_config_file, read_config
from fishertune_d2.data.metadata import registered_dataset
from fishertune_d2.data.protocols import Protocol
from fishertune_d2.engine.run_keys import Result, changes, defining_keys
from fishertune_d2.engine.scoring import score_rules
from fishertune_d2.fisher import ESTIMATORS
from fishertune_d2.run import Results, Run, RunError
from fishertune_d2.tuning import build_tuning_method

from .request import Request
from .tables import FREEZE, RATE, Entry

DEV = "dev"  # the folder below a cell's own for scores on the dev sets that are made after training


@dataclass(frozen=True)
class Shared:
    """A file that one cell makes and others use."""

    words: str  # in messages
    file: str  # its name in the folder of the cell that makes it
    key: str  # the key of the config that names the file to use
    name: str  # the start of its shared name
    result: Result  # what it holds

    def path(self, place: Path, recipe: Mapping[str, Any]) -> Path:
        """Returns the shared path, named by a digest of all that the file depends on."""
        keys = {key: value for key, value in recipe.items() if changes(key, self.result)}
        estimator = ESTIMATORS.get(keys.get("FISHER.ESTIMATOR", ""))
        if estimator is not None and estimator.version > 1:
            keys["version"] = estimator.version  # an older version's estimate is another one
        name = f"{self.name}_{recipe['SEED']}_{digest(keys)}{Path(self.file).suffix}"
        return place / "shared" / name


WARMUP = Shared("warm-up", "model_warmup.pth", "TUNING.WARMUP_CHECKPOINT", "warmup", Result.WARMUP)
ESTIMATE = Shared(
    "Fisher estimate", "fisher.safetensors", "FISHER.ESTIMATE", "fisher", Result.ESTIMATE
)


@dataclass(frozen=True)
class Cell:
    """One run."""

    entry: Entry  # the method with its options
    vfm: str  # MODEL.VFM.NAME
    seed: int
    rate: float | None  # the value of RATE; None uses the config's
    folder: Path  # OUTPUT_DIR, or the run's path in a study's table
    config: str  # a name for get_config_file
    options: tuple[str, ...]  # keys and values in turn, without test sets and shared files
    recipe: Mapping[str, Any]  # the keys that define the training, and their values
    shared: Mapping[Shared, Path] = field(default_factory=dict)
    makes: frozenset[Shared] = frozenset()  # of the shared files; the cell takes the others
    rules: Mapping[str, Any] = field(default_factory=dict)  # how the config scores
    # (width, height) by data set; None is the files' size.
    test_sizes: Mapping[str, Sequence[int] | None] = field(default_factory=dict)
    halved: frozenset[str] = frozenset()  # the data sets that are scored on halved labels
    best_on: str = ""  # TEST.BEST_ON

    @property
    def takes(self) -> dict[Shared, Path]:
        """The shared files that other cells make."""
        return {what: path for what, path in self.shared.items() if what not in self.makes}

    def arguments(self, sets: Sequence[str]) -> list[str]:
        """Returns the arguments that train the cell or resume it, and score it at the end."""
        paths = {WARMUP.key: "", ESTIMATE.key: ""}  # overrides files that a config names
        paths |= {what.key: str(path) for what, path in self.takes.items()}
        taken = [word for pair in paths.items() for word in pair]
        return [*self._start(self.folder, sets, "--resume"), *taken]

    def score_arguments(self, sets: Sequence[str], folder: Path) -> list[str]:
        """Returns the arguments that score the trained cell, for results in ``folder``.

        The test sets see the best checkpoint, if the config keeps it; dev sets chose it.
        """
        best = self.best_on and folder.name == TEST
        weights = Run(self.folder).best_checkpoint if best else self.weights
        start = self._start(folder, sets, "--eval-only")
        return [*start, "MODEL.WEIGHTS", str(weights), *(["TEST.BEST_ON", ""] if best else [])]

    def _start(self, folder: Path, sets: Sequence[str], flag: str) -> list[str]:
        start = ["--config-file", get_config_file(self.config), flag, *self.options]
        return [*start, "DATASETS.TEST", str(tuple(sets)), "OUTPUT_DIR", str(folder)]

    @property
    def weights(self) -> Path:
        """The trained model's file; see ``Run.checkpoint``."""
        return Run(self.folder).checkpoint

    def scored_in(self, name: str) -> Path:
        """Returns the folder for the scores of the trained cell.

        Args:
            name: The folder below the cell's own. A training that ended before it was scored uses
                the cell's own, but never for test sets: a search must know that they were seen.
        """
        scored = (self.folder / "results.json").is_file()
        return self.folder / name if scored or name == TEST else self.folder

    def results(self, sets: Sequence[str], name: str) -> Results | None:
        """Returns the scores on all these data sets; None if some are missing or damaged.

        Args:
            sets: The data sets.
            name: The folder below the cell's own for scores that are made after training.

        Returns:
            The scores of the cell's own folder, or of that below it; not those that were made by
            other rules or at other sizes than the config's.
        """
        for folder in (self.folder, self.folder / name):
            with suppress(RunError):  # there are none, or a kill cut the file off
                results = read_results(folder)
                if {*sets} <= results.scores.keys() and self._scored(results, sets):
                    return results
        return None

    def _scored(self, results: Results, sets: Sequence[str]) -> bool:
        """Whether the config would score so; earlier versions recorded fewer facts."""
        recorded = {"precision": "float32", **results.protocol}
        if any(recorded.get(key, value) != value for key, value in self.rules.items()):
            return False
        if {*recorded.get("halved_labels", self.halved)} & {*sets} != self.halved & {*sets}:
            return False
        sizes = recorded.get("test_size", {})
        known = [name for name in sets if name in sizes and name in self.test_sizes]
        return all(equal_values(sizes[name], self.test_sizes[name]) for name in known)


def make_cells(
    request: Request,
    rates: Mapping[tuple[str, str], Sequence[float]],
    entries: Sequence[Entry] | None = None,
) -> list[Cell]:
    """Makes the cells of a table.

    An unknown key or method raises a KeyError, and an entry without a config a FileNotFoundError.

    Args:
        request: The table.
        rates: The values of RATE to run, for (vfm, ``Entry.rate_of``); by default the config's.
        entries: The entries; None uses those of the request.

    Returns:
        The cells, in the order in which they run.
    """
    cells: dict[Path, Cell] = {}
    for vfm in request.vfms:
        for entry in request.entries if entries is None else entries:
            for rate in rates.get((vfm, entry.rate_of)) or (None,):
                for cell in _make(request, entry, vfm, rate):
                    cells.setdefault(cell.folder, cell)
    # The first cell with a shared file makes it, unless it exists.
    made: set[Path] = set()
    result = []
    for cell in cells.values():
        makes = {w for w, path in cell.shared.items() if path not in made and not path.exists()}
        made |= {cell.shared[what] for what in makes}
        result.append(replace(cell, makes=frozenset(makes)))
    return result


def _make(request: Request, entry: Entry, vfm: str, rate: float | None) -> list[Cell]:
    """Makes a cell for each seed. It reads the config once, because that takes most of the time."""
    config, own = _find_config(request, entry, vfm)
    options = ["TUNING.METHOD", entry.method, "MODEL.VFM.NAME", vfm]
    options += [*entry.options, *request.options]
    cfg = read_config(get_config_file(config), options)
    method = build_tuning_method(cfg)
    missing: list[str] = []
    if rate is not None:
        missing += [RATE, str(rate)]
    elif RATE not in options and not own and method.adds:
        missing += [RATE, "1.0"]  # added parameters learn as fast as the head, as in Rein and SET
    if not method.takes_warmup and "TUNING.WARMUP_ITERS" not in options:
        missing += ["TUNING.WARMUP_ITERS", "0"]
    if missing:
        options += missing
        cfg = read_config(get_config_file(config), options)
    place = request.place(vfm)
    shared = [WARMUP] if cfg.TUNING.WARMUP_ITERS else []
    shared += [ESTIMATE] if method.selects and method.estimates else []
    keys = json.loads(json.dumps(defining_keys(cfg)))
    rules, sets = _rules(cfg), request.test_sets
    sizes, halved, best_on = _test_sizes(cfg, sets), _halved(cfg, sets), cfg.TEST.BEST_ON
    cells = []
    for seed in request.seeds:
        recipe = keys | {"SEED": seed}
        paths = {what: what.path(place, recipe) for what in shared}
        folder, of_seed = place / folder_name(entry, rate, seed), (*options, "SEED", str(seed))
        parts = entry, vfm, seed, rate, folder, config, of_seed, recipe, paths
        cell = Cell(*parts, rules=rules, test_sizes=sizes, halved=halved, best_on=best_on)
        cells.append(cell)
    return cells


def _rules(cfg: CfgNode) -> dict[str, Any]:
    """How a config scores, with the facts that ``results.json`` leaves out where they are usual."""
    return {"name": cfg.TEST.PROTOCOL, "precision": "float32", **score_rules(cfg)}


def _test_sizes(cfg: CfgNode, names: Sequence[str]) -> Mapping[str, Sequence[int] | None]:
    """The sizes at which a config tests those data sets that are registered."""
    found = {name: registered_dataset(name) for name in names}
    own = {name: dataset.test_size for name, dataset in found.items() if dataset}
    return own | Protocol.from_config(cfg).sizes_of(own)


def _halved(cfg: CfgNode, names: Sequence[str]) -> frozenset[str]:
    """Those data sets whose labels a config scores at half of the files' size."""
    found = {name: registered_dataset(name) for name in names}
    native = Protocol.from_config(cfg).native_labels
    return frozenset(
        name for name, each in found.items() if each and each.halve_labels and not native
    )


def _find_config(request: Request, entry: Entry, vfm: str) -> tuple[str, bool]:
    """Returns an entry's config, and whether it is its method's own."""
    # configs/fishertune_dinov2.yaml is for dinov2_vitl; a cell always sets MODEL.VFM.NAME.
    models = (vfm, vfm.rpartition("_")[0])
    profile, tried = request.profile, []
    for pattern, names in ((profile.config, (entry.method, entry.config)), (profile.base, ("",))):
        for name in names:
            for model in models:
                path = pattern.format(source=request.source, method=name, vfm=model)
                if (CONFIGS / path).is_file():
                    return path, name == entry.method
                tried.append(path)
    raise FileNotFoundError(
        f"no config for {entry.name} with {vfm}: looked in {CONFIGS} for "
        f"{', '.join(dict.fromkeys(tried))}"
    )


def digest(keys: Mapping[str, Any]) -> str:
    """Returns a short name for the values of keys."""
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]


def makers(cells: Sequence[Cell]) -> dict[Path, set[Path]]:
    """Returns for each cell's folder the folders of the cells that make its shared files."""
    made_in = {cell.shared[what]: cell.folder for cell in cells for what in cell.makes}
    return {
        cell.folder: {made_in[path] for path in cell.takes.values() if path in made_in}
        for cell in cells
    }


def sweep_entries(request: Request, key: str, values: Sequence[str]) -> list[Entry]:
    """Replaces each entry of a table by its variants with the values of a key.

    Args:
        request: The table.
        key: The key of the config.
        values: The values, as on a command line.

    Returns:
        The variants. The entry itself stands for the value that it has in the config of the first
        foundation model.
    """
    swept = []
    for entry in request.entries:
        config, _ = _find_config(request, entry, request.vfms[0])
        plain = ["TUNING.METHOD", entry.method, *entry.options]
        before = read_config(get_config_file(config), plain)
        for value in values:
            same = read_config(get_config_file(config), [*plain, key, value]) == before
            name, options = f"{entry.name}@{key}={value}", (*entry.options, key, value)
            swept.append(entry if same else replace(entry, name=name, options=options))
    return swept


def folder_name(entry: Entry, rate: float | None, seed: int) -> str:
    """The name of a cell's folder."""
    name = entry.name if rate is None else f"{entry.name}@rate={rate:g}"
    return f"{file_name(name)}_{seed}"


def recipe_of(folder: Path) -> dict[str, Any]:
    """The recipe of the cell that was run in a folder; empty if none was."""
    path = folder / "cell.json"
    return json.loads(path.read_text())["recipe"] if path.is_file() else {}


def file_name(text: str) -> str:
    """Replaces the characters that do not belong in a folder's name."""
    return re.sub(r"[^\w.@=+-]+", "-", text).strip("-")


def needs_rate(entry: Entry) -> bool:
    """Whether an entry trains in the backbone, so that its learning rate matters."""
    return entry.method != FREEZE and RATE not in entry.options
