"""What the bench can run, as data: ``PROFILES``, ``ROWS`` and ``TABLES``.

A profile is a setting of data and recipe, a row a way to tune, a table a list of rows. A new one of
any is an entry here. Every name of the tuning registry is a row by itself and needs no entry.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from fishertune_d2.tuning import TUNING_REGISTRY

FREEZE = "freeze"  # first in a table, so that the warm-up that others take is its own
OURS = "fishertune"  # what differences are taken to
RATE = "SOLVER.BACKBONE_MULTIPLIER"  # the backbone's learning rate, as a share of BASE_LR


@dataclass(frozen=True)
class Profile:
    """A setting: which configs, and which data to choose on and to test on.

    Attributes:
        config: a row's own config, below configs/, with {source}, {row} and {vfm} to fill in.
        base: the config for rows that have none.
        vfms: foundation models if none are asked for; empty for those of the table.
        dev: data sets to choose on and to score on meanwhile; empty if there are none, then runs
            are scored on the test sets at once.
        test: data sets of the final test, by the end of the name of the table that shows them, with
            an average over the unseen of them; empty for those of the table.
        rates: SOLVER.BACKBONE_MULTIPLIER's values in the search; empty for those of the configs.
    """

    config: str
    base: str
    vfms: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rates: tuple[float, ...] = ()


_CAMVID_TEST = ("camvid_day_test", "camvid_dusk_test")
PROFILES: dict[str, Profile] = {
    "paper": Profile(config="{source}{row}_{vfm}.yaml", base="{source}fishertune_{vfm}.yaml"),
    "camvid": Profile(
        config="camvid/{row}.yaml",
        base="camvid/Base-camvid.yaml",
        vfms=("dinov2_vits",),
        dev=("camvid_day_val", "camvid_dusk_dev"),
        test={"test": _CAMVID_TEST},
        rates=(0.3, 1.0, 3.0),
    ),
    # Chosen on CamVid too, so that no shift of the scenes is looked at before the test.
    "streets": Profile(
        config="streets/{row}.yaml",
        base="streets/Base-streets.yaml",
        vfms=("dinov2_vits",),
        dev=("camvid_day_val", "camvid_dusk_dev"),
        test={
            "test_camvid": _CAMVID_TEST,
            "test_shifts": (
                *("streets_day_val", "streets_dusk_val", "streets_night_val"),
                *("streets_fog_val", "streets_rain_val", "streets_snow_val"),
            ),
        },
        rates=(0.3, 1.0, 3.0),
    ),
}


@dataclass(frozen=True)
class Row:
    """A way to tune.

    Attributes:
        name: what tables and folders call it.
        method: TUNING.METHOD.
        config: the method whose config it starts from if the profile has none of its own method.
        rate_of: the row whose chosen learning rate it takes: variants of a method take its.
        options: keys and values in turn, which go before those of the config.
    """

    name: str
    method: str
    config: str
    rate_of: str
    options: tuple[str, ...] = ()

    def with_options(self, mark: str, *options: str) -> "Row":
        """The row with further options, and a mark of them in its name."""
        return replace(self, name=f"{self.name}@{mark}", options=(*self.options, *options))


def _variant(name: str, method: str, *options: str) -> Row:
    return Row(name, method, method, method, options)


def _selected(name: str, *options: str) -> Row:
    return Row(name, name, "fishertune", name, options)


def _peft(name: str) -> Row:
    return Row(name, "peft", "peft", name, ("TUNING.PEFT.TYPE", name.upper()))


_THIRDS = {"shallow": (0.0, 0.3333), "middle": (0.3333, 0.6667), "deep": (0.6667, 1.0)}
# A third of the blocks' Q (2.7 % of a ViT-S, 2.8 % of a ViT-L) has to hold it.
_SHARE_OF_GROUP = ("TUNING.D_MAX", "0.025")
_GROUPS = tuple(f"{kind}_{part}" for kind in ("q", "k", "v", "ffn") for part in _THIRDS)


def _group(name: str) -> Row:
    kind, part = name.split("_")
    options = ("TUNING.GROUP.KINDS", f"['{kind.upper()}']")
    options += ("TUNING.GROUP.DEPTH", str(list(_THIRDS[part])), *_SHARE_OF_GROUP)
    return Row(name, "group", "fishertune", "random", options)


# As their authors: a warm-up would train queries that the tokens then replace.
_WITHOUT_WARMUP = {name: ("TUNING.WARMUP_ITERS", "0") for name in ("rein", "set")}


def _with_perturbation(method: str) -> Row:
    options = (*_WITHOUT_WARMUP.get(method, ()), "TUNING.FEATURE_PERTURBATION", "True")
    return _variant(f"{method}_fp", method, *options)


ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        *(_selected(name) for name in ("fisher", "delta_fisher")),
        *(_selected(name) for name in ("random", "random_q", "random_k", "random_v")),
        _selected("childtune"),
        *(_variant(name, name, *options) for name, options in _WITHOUT_WARMUP.items()),
        *(_peft(name) for name in ("dora", "vera", "ia3")),
        *map(_group, _GROUPS),
        _variant("share_2.5", "fishertune", *_SHARE_OF_GROUP),
        *(_with_perturbation(name) for name in ("adaptformer", "vpt", "rein", "fishertune")),
        _variant("eq7", "fishertune", "FISHER.FORM", "eq7"),
        _variant("eq15", "fishertune", "FISHER.FORM", "eq15"),
        _variant("rank", "fishertune", "FISHER.FORM", "rank"),
        _variant("share_1", "fishertune", "TUNING.D_MAX", "0.01"),
        _variant("share_20", "fishertune", "TUNING.D_MAX", "0.2"),
        _variant("smoothed", "fishertune", "FISHER.ESTIMATOR", "smoothed"),
        _variant("natural", "fishertune", "FISHER.ESTIMATOR", "natural"),
        _variant("variational", "fishertune", "FISHER.ESTIMATOR", "variational"),
        replace(_selected("fisher", "FISHER.ESTIMATOR", "variational"), name="fisher_variational"),
        _variant("sampled_labels", "fishertune", "FISHER.LABELS", "sampled"),
        _variant("shift_embedding", "fishertune", "FISHER.PERTURB.POINTS", "[0]"),
        _variant("shift_blocks", "fishertune", "FISHER.PERTURB.POINTS", "[1, 2, 3]"),
    )
}


def find_row(name: str) -> Row:
    """An entry of ``ROWS``, or a tuning method by its name."""
    return ROWS.get(name) or Row(name, name, name, name)


def rows_of_registry() -> list[str]:
    """Every name that ``find_row`` makes a row of whose method is registered."""
    methods = [name for name, _ in TUNING_REGISTRY]
    return list(dict.fromkeys(methods + [r.name for r in ROWS.values() if r.method in methods]))


_GTAV, _CITYSCAPES = "", "cityscapes_to_bdd100k/"
_L = ("dinov2_vitl", "eva02_vitl")
_CBM = ("cityscapes_val", "bdd100k_val", "mapillary_val")


@dataclass(frozen=True)
class Table:
    """Rows beside each other.

    Attributes:
        title: what it shows.
        rows: names for ``find_row``.
        vfms: foundation models in the profile ``paper``.
        source: folder of configs in the profile ``paper``, which says what is trained on. All
            configs/cityscapes_to_*/ train the same model, so tables share those of one.
        test: test sets in the profile ``paper``, the source's own among them.
        search: whether the learning rate of each row is chosen first, if the profile has dev
            sets; if not, the configs' are taken.
        paper: the table of paper.csv with its numbers; "" if there are none.
        averages: whether the figure shows averages over unseen domains instead of data sets.
    """

    title: str
    rows: tuple[str, ...]
    vfms: tuple[str, ...] = _L
    source: str = _GTAV
    test: tuple[str, ...] = _CBM
    search: bool = True
    paper: str = ""
    averages: bool = False


_RIVALS = (FREEZE, "full", "lora", "adaptformer", "vpt", "vqt", "rein", "childtune")
_CITY_ROWS = (FREEZE, "full", "rein", "vqt", "childtune", "fishertune")
_TABLE_1 = Table(
    "Table 1: ways to tune, on each foundation model",
    rows=(*_RIVALS, "set", "fishertune"),
    vfms=("clip_vitl", "mae_vitl", "sam_vith", "eva02_vitl", "dinov2_vitl"),
    paper="table1",
)
TABLES: dict[str, Table] = {
    "table1": _TABLE_1,
    "table2": Table(
        "Table 2: from one city to others",
        rows=_CITY_ROWS,
        source=_CITYSCAPES,
        test=("cityscapes_val", "bdd100k_val", "acdc_val"),
        paper="table2",
    ),
    "table3": Table(
        "Table 3: adverse weather",
        rows=_CITY_ROWS,
        vfms=("dinov2_vitl",),
        source=_CITYSCAPES,
        test=(
            *("cityscapes_val", "foggy_zurich", "foggy_driving", "dark_zurich_val"),
            *("nighttime_driving", "acdc_rain_val", "acdc_snow_val"),
        ),
        paper="table3",
    ),
    "table4": Table(
        "Table 4: which weights to select",
        rows=(
            *(FREEZE, "full", "random", "random_q", "random_k", "random_v"),
            *("fisher", "delta_fisher", "fishertune"),
        ),
        source=_CITYSCAPES,
        test=("cityscapes_val", "bdd100k_val", "acdc_val"),
        paper="table4",
    ),
    "table5": Table(
        "Table 5: perturbed features in training (_fp)",
        rows=tuple(
            name + end
            for name in ("adaptformer", "vpt", "rein", "fishertune")
            for end in ("", "_fp")
        ),
        paper="table5",
    ),
    "fig2": replace(
        _TABLE_1, title="Fig. 2: average by foundation model and way to tune", averages=True
    ),
    "fig3": Table(
        "Fig. 3: one kind in one third of the blocks, as many weights of each",
        rows=(FREEZE, *_GROUPS, "share_2.5"),
        source=_CITYSCAPES,
        test=("cityscapes_val", "bdd100k_val", "acdc_val"),
    ),
    "fig5": Table(
        "Fig. 5: plain and variational estimates, of F and of DRF",
        rows=("fisher", "fisher_variational", "fishertune", "variational"),
        source=_CITYSCAPES,
        test=("cityscapes_val", "bdd100k_val", "acdc_val"),
    ),
    # docs/results/selection.md. Its rates were chosen before (docs/results/camvid.md).
    "selection": Table(
        "Which weights to select",
        rows=(
            *(FREEZE, "full", "fishertune", "fisher", "delta_fisher", "random", "random_q"),
            *("random_k", "random_v", "eq7", "eq15", "rank", "share_1", "share_20", "smoothed"),
            *("natural", "variational", "fisher_variational", "sampled_labels"),
            *("shift_embedding", "shift_blocks"),
        ),
        search=False,
    ),
}


def sweep(key: str) -> Table:
    """FisherTune with one key changed, as the paper's appendices C and E; its rows are to be made.

    Args:
        key: of the config.
    """
    return Table(f"FisherTune by {key}", rows=("fishertune",), search=key != RATE)
