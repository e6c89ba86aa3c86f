"""Cells: a row, a foundation model and a seed; what each runs, and what cells share.

Two things are made once and taken by every other cell of the same seed and foundation model for
which they would come out the same: the warm-up, and the Fisher estimate. Whether they would is read
off the configs. The first cell in the table that needs one makes it.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from detectron2.config import CfgNode

from fishertune_d2.config import CONFIGS, get_config_file, read_config
from fishertune_d2.engine.run_record import changes_estimate, changes_warmup, defining_keys
from fishertune_d2.tuning import build_tuning_method

from .tables import FREEZE, RATE, Profile, Row


@dataclass(frozen=True)
class Shared:
    """Something that one cell makes and others take.

    Attributes:
        words: what messages call it.
        file: its name in the folder of the cell that makes it.
        key: of the config, takes the file.
    """

    words: str
    file: str
    key: str


WARMUP = Shared("warm-up", "model_warmup.pth", "TUNING.WARMUP_CHECKPOINT")
ESTIMATE = Shared("Fisher estimate", "fisher.safetensors", "FISHER.ESTIMATE")


@dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
        row: how to tune.
        vfm: a name in ``fishertune_d2.modeling.VFMS``.
        seed: SEED.
        rate: the chosen RATE; None for the config's.
        folder: OUTPUT_DIR.
        config: the config, by its name for ``get_config_file``.
        options: keys and values in turn, but for test sets and for what is shared.
        recipe: the keys that say what is trained, and their values.
        shared: where what it shares lies once it is made.
        makes: what of it this cell makes; the rest it takes.
    """

    row: Row
    vfm: str
    seed: int
    rate: float | None
    folder: Path
    config: str
    options: tuple[str, ...]
    recipe: Mapping[str, Any]
    shared: Mapping[Shared, Path] = field(default_factory=dict)
    makes: frozenset[Shared] = frozenset()

    @property
    def takes(self) -> dict[Shared, Path]:
        """What others make for it."""
        return {what: path for what, path in self.shared.items() if what not in self.makes}

    def arguments(self, sets: Sequence[str]) -> list[str]:
        """The arguments with which fishertune_d2.train trains it, or goes on with it.

        Args:
            sets: data sets to score it on at the end.
        """
        paths = {WARMUP.key: "", ESTIMATE.key: ""}  # in place of what a config may say
        paths |= {what.key: str(path) for what, path in self.takes.items()}
        taken = [word for pair in paths.items() for word in pair]
        return [*self._start(self.folder, sets, "--resume"), *taken]

    def score_arguments(self, sets: Sequence[str], folder: Path) -> list[str]:
        """The arguments with which fishertune_d2.train scores it, once it is trained.

        Args:
            sets: data sets.
            folder: where the results go.
        """
        return [*self._start(folder, sets, "--eval-only"), "MODEL.WEIGHTS", str(self.weights)]

    def _start(self, folder: Path, sets: Sequence[str], flag: str) -> list[str]:
        start = ["--config-file", get_config_file(self.config), flag, *self.options]
        return [*start, "DATASETS.TEST", str(tuple(sets)), "OUTPUT_DIR", str(folder)]

    @property
    def weights(self) -> Path:
        """The trained model; there once training is over."""
        return self.folder / "model_final.pth"

    def results(self, sets: Sequence[str], name: str) -> dict[str, Any] | None:
        """Its results on the data sets, if they are there.

        Args:
            sets: data sets, all of which must have been scored.
            name: folder below its own for what was scored after training; looked at second.
        """
        for file in (self.folder / "results.json", self.folder / name / "results.json"):
            try:
                results = json.loads(file.read_text())
            except (OSError, json.JSONDecodeError):  # none, or cut off while it was written
                continue
            if {*sets} <= {*results["source"], *results["targets"]}:
                return results
        return None


def make_cells(
    rows: Iterable[Row],
    vfms: Iterable[str],
    seeds: Iterable[int],
    *,
    profile: Profile,
    source: str,
    output: Path,
    rates: Mapping[tuple[str, str], Sequence[float]],
    options: Sequence[str] = (),
) -> list[Cell]:
    """The cells of a table in the order of their running, with what they share.

    Args:
        rows: of the table.
        vfms: foundation models.
        seeds: their seeds.
        profile: where the configs are.
        source: the table's folder of configs.
        output: folder of all cells.
        rates: for (vfm, ``Row.rate_of``) the values of RATE to run; none for the config's.
        options: keys and values in turn for every cell.

    Raises:
        KeyError: if a config has no such key, or a method is not registered.
        FileNotFoundError: if there is no config for a row.
        ValueError: if a value does not fit its key.
    """
    rows, seeds = list(rows), list(seeds)
    cells = []
    for vfm in vfms:
        for row in rows:
            for rate in rates.get((vfm, row.rate_of)) or [None]:
                for seed in seeds:
                    cell = _make(row, vfm, seed, rate, profile, source, output, options)
                    cells.append(cell)
    unique = {cell.folder: cell for cell in reversed(cells)}
    cells = [cell for cell in cells if unique[cell.folder] is cell]
    return _let_first_make(cells)


def _make(
    row: Row,
    vfm: str,
    seed: int,
    rate: float | None,
    profile: Profile,
    source: str,
    output: Path,
    extra: Sequence[str],
) -> Cell:
    config, own = _find_config(row, vfm, profile, source)
    options = ["TUNING.METHOD", row.method, "MODEL.VFM.NAME", vfm, "SEED", str(seed)]
    options += [*row.options, *extra]
    cfg = read_config(get_config_file(config), options)
    method = build_tuning_method(cfg)
    multiplier = rate
    if rate is None and RATE not in options and not own and getattr(method, "adds", False):
        multiplier = 1.0  # what is added learns as fast as the head, as its authors do
    if multiplier is not None:
        options += [RATE, str(multiplier)]
        cfg = read_config(get_config_file(config), options)
    name = row.name if rate is None else f"{row.name}@rate={rate:g}"
    place = output / (source or ".") / vfm
    recipe = defining_keys(cfg)
    return Cell(
        row,
        vfm,
        seed,
        rate,
        place / f"{file_name(name)}_{seed}",
        config,
        tuple(options),
        json.loads(json.dumps(recipe)),
        _shared(cfg, recipe, place / "shared", estimates=method.selects and method.estimates),
    )


def _find_config(row: Row, vfm: str, profile: Profile, source: str) -> tuple[str, bool]:
    """The config that a row starts from, and whether it is its method's own."""
    # dinov2_vitl is the model of configs/fishertune_dinov2.yaml; MODEL.VFM.NAME is set in any case.
    models = (vfm, vfm.rpartition("_")[0])
    tried = []
    for pattern, names in ((profile.config, (row.method, row.config)), (profile.base, ("",))):
        for name in names:
            for model in models:
                path = pattern.format(source=source, row=name, vfm=model)
                if (CONFIGS / path).is_file():
                    return path, name == row.method
                tried.append(path)
    raise FileNotFoundError(
        f"no config for {row.name} with {vfm}: looked in {CONFIGS} for "
        f"{', '.join(dict.fromkeys(tried))}"
    )


def _shared(
    cfg: CfgNode, recipe: Mapping[str, Any], folder: Path, estimates: bool
) -> dict[Shared, Path]:
    """Files in which what a run can share lies, named by all that it depends on."""
    shared = {}
    if cfg.TUNING.WARMUP_ITERS:
        warmup = {key: value for key, value in recipe.items() if changes_warmup(key)}
        shared[WARMUP] = folder / f"warmup_{cfg.SEED}_{_digest(warmup)}.pth"
    if estimates:
        estimate = {key: value for key, value in recipe.items() if changes_estimate(key)}
        shared[ESTIMATE] = folder / f"fisher_{cfg.SEED}_{_digest(estimate)}.safetensors"
    return shared


def _digest(keys: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]


def _let_first_make(cells: Sequence[Cell]) -> list[Cell]:
    """Lets the first cell with each shared file make it, unless it is there; those run first."""
    made: set[Path] = set()
    result = []
    for cell in cells:
        makes = {
            what for what, path in cell.shared.items() if path not in made and not path.exists()
        }
        made |= {cell.shared[what] for what in makes}
        result.append(replace(cell, makes=frozenset(makes)))
    return result


def makers(cells: Sequence[Cell]) -> dict[Path, set[Path]]:
    """For each cell's folder, those of the cells that make what it takes."""
    made_in = {cell.shared[what]: cell.folder for cell in cells for what in cell.makes}
    return {
        cell.folder: {made_in[path] for path in cell.takes.values() if path in made_in}
        for cell in cells
    }


def sweep_rows(
    row: Row, key: str, values: Sequence[str], *, vfm: str, profile: Profile, source: str
) -> list[Row]:
    """The row with each value of a key; the row itself for the value that its config has.

    Args:
        row: to change.
        key: of the config.
        values: as on a command line.
        vfm: foundation model whose config tells.
        profile: where the configs are.
        source: the table's folder of configs.

    Raises:
        FileNotFoundError: if there is no config for the row.
    """
    config, _ = _find_config(row, vfm, profile, source)
    plain = ["TUNING.METHOD", row.method, *row.options]
    before = read_config(get_config_file(config), plain)
    return [
        row
        if read_config(get_config_file(config), [*plain, key, value]) == before
        else row.with_options(f"{key}={value}", key, value)
        for value in values
    ]


def file_name(text: str) -> str:
    """The text with what a folder's name should not hold replaced."""
    return re.sub(r"[^\w.@=+-]+", "-", text).strip("-")


def needs_rate(row: Row) -> bool:
    """Whether a row trains something of the backbone, so that its learning rate matters."""
    return row.method != FREEZE and RATE not in row.options
