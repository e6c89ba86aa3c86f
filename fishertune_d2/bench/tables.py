"""Everything that the bench can run, as data: ``PROFILES``, ``ENTRIES`` and ``TABLES``.

A profile is a setting of data and recipe, an entry is a method with its options, and a table is a
list of entries. Add a new one of any here. Every method of the tuning registry is an entry already.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from fishertune_d2.data.held_out import HELD_OUT
from fishertune_d2.tuning import TUNING_REGISTRY

FREEZE = "freeze"  # comes first in a table, so that the others take over its warm-up
RATE = "SOLVER.BACKBONE_MULTIPLIER"  # the backbone's learning rate, as a share of BASE_LR


@dataclass(frozen=True)
class Profile:
    """A setting: the configs, and the data sets for choosing and for testing.

    Attributes:
        config: The pattern of a method's own config below configs/, with {source}, {method} and
            {vfm}.
        base: The pattern of the config for methods without their own.
        vfms: The default foundation models; empty uses those of the table.
        dev: The data sets on which learning rates are chosen and runs are scored before the test.
            Empty scores runs on the test sets at once.
        test: Final test sets, keyed by the suffix of their table's name; each table averages its
            own unseen sets. Empty uses those of the table.
        rates: The values of SOLVER.BACKBONE_MULTIPLIER to search.
        search: Keys and values in turn for the cells of a search alone, such as those of a shorter
            training.
        held_out: For a profile without ``dev``, by the folder of configs: what a search trains on,
            and its dev sets. Without a search, such a profile uses the rates of its configs.
    """

    config: str
    base: str
    vfms: tuple[str, ...] = ()
    dev: tuple[str, ...] = ()
    test: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rates: tuple[float, ...] = ()
    search: tuple[str, ...] = ()
    held_out: Mapping[str, tuple[str, tuple[str, ...]]] = field(default_factory=dict)


def _held_out(source: str) -> tuple[str, tuple[str, ...]]:
    train, *dev = (dataset.name for dataset in HELD_OUT[source])
    return train, tuple(dev)


_CAMVID_TEST = ("camvid_day_test", "camvid_dusk_test")
_CAMVID = Profile(
    config="camvid/{method}.yaml",
    base="camvid/Base-camvid.yaml",
    vfms=("dinov2_vits",),
    dev=("camvid_day_val", "camvid_dusk_dev"),
    test={"test": _CAMVID_TEST},
    rates=(0.3, 1.0, 3.0),
)


def _long(source: str) -> Profile:
    """A training of 5,000 iterations, scored every 250; a search has a quarter of the length."""
    quarter = ("SOLVER.MAX_ITER", "1250", "TUNING.WARMUP_ITERS", "250")
    return replace(
        _CAMVID,
        config=f"long/{source}_{{method}}.yaml",
        base=f"long/{source}.yaml",
        search=(*quarter, "TEST.EVAL_PERIOD", "0", "TEST.BEST_ON", ""),
    )


PROFILES: dict[str, Profile] = {
    "paper": Profile(
        config="{source}{method}_{vfm}.yaml",
        base="{source}fishertune_{vfm}.yaml",
        rates=(0.1, 0.3, 1.0, 3.0),
        held_out={"": _held_out("gtav"), "cityscapes/": _held_out("cityscapes")},
    ),
    "camvid": _CAMVID,
    # Learning rates are chosen on CamVid: the final test is the first look at the scenes' shifts.
    "streets": replace(
        _CAMVID,
        config="streets/{method}.yaml",
        base="streets/Base-streets.yaml",
        test={
            "test_camvid": _CAMVID_TEST,
            "test_shifts": (
                *("streets_day_val", "streets_dusk_val", "streets_night_val"),
                *("streets_fog_val", "streets_rain_val", "streets_snow_val"),
            ),
        },
    ),
    "camvid_long": _long("camvid"),
    "streets_long": _long("streets"),
}


@dataclass(frozen=True)
class Entry:
    """A method with its options, as a table compares it with others.

    Attributes:
        name: The name in tables and folders.
        method: TUNING.METHOD.
        config: The method whose config is used if the profile has no config for ``method``.
        rate_of: The entry whose chosen learning rate is used; a variant uses that of its method.
        options: Keys and values in turn, which override the config.
    """

    name: str
    method: str
    config: str
    rate_of: str
    options: tuple[str, ...] = ()


def _variant(name: str, method: str, *options: str) -> Entry:
    return Entry(name, method, method, method, options)


def _selected(name: str, *options: str) -> Entry:
    return Entry(name, name, "fishertune", name, options)


def _peft(name: str) -> Entry:
    return Entry(name, "peft", "peft", name, ("TUNING.PEFT.TYPE", name.upper()))


_THIRDS = {"shallow": (0.0, 0.3333), "middle": (0.3333, 0.6667), "deep": (0.6667, 1.0)}
# Q in a third of the blocks must hold this share: it is 2.7 % of a ViT-S, 2.8 % of a ViT-L.
_SHARE_OF_GROUP = ("TUNING.D_MAX", "0.025")
_GROUPS = tuple(f"{kind}_{part}" for kind in ("q", "k", "v", "ffn") for part in _THIRDS)


def _group(name: str) -> Entry:
    kind, part = name.split("_")
    kinds = ("TUNING.GROUP.KINDS", f"['{kind.upper()}']")
    depth = ("TUNING.GROUP.DEPTH", str(list(_THIRDS[part])))
    return Entry(name, "group", "fishertune", "random", (*kinds, *depth, *_SHARE_OF_GROUP))


_UNIT_OPTIONS = {
    "neuron": ("TUNING.UNIT", "neuron"),
    "layer": ("TUNING.ALLOCATION", "layer"),
    "20": ("TUNING.D_MAX", "0.2"),
    "rho1": ("FISHER.RHO", "1.0"),
    "steps": ("TUNING.STEPS", "fisher"),
}
# A method, and what differs from single weights, one ranking, 5 %, rho 0.01 and equal steps.
_UNITS = (
    *(
        "_".join([method, *ways])
        for method in ("fishertune", "fisher", "random")
        for ways in (("layer",), ("neuron",), ("neuron", "layer"), ("neuron", "20"))
    ),
    *(f"{method}_20" for method in ("fishertune", "fisher", "random")),
    "fishertune_neuron_layer_20",
    "fishertune_neuron_rho1",
    "fishertune_neuron_20_rho1",
    "fishertune_neuron_layer_20_rho1",
    "fishertune_neuron_steps",
    "fishertune_neuron_20_steps",
    "fishertune_neuron_20_rho1_steps",
    "fisher_neuron_20_steps",
)


def _of_units(name: str) -> Entry:
    method, *ways = name.split("_")
    options = tuple(part for way in ways for part in _UNIT_OPTIONS[way])
    return Entry(name, method, "fishertune", name, options)


_KIND = "FISHER.PERTURB.KIND"
_PERTURBED = ("adaptformer", "vpt", "rein", "fishertune")  # Table 5

ENTRIES: dict[str, Entry] = {
    entry.name: entry
    for entry in (
        *map(_selected, ("fisher", "delta_fisher", "childtune")),
        *map(_selected, ("random", "random_q", "random_k", "random_v")),
        *map(_peft, ("dora", "vera", "ia3")),
        *map(_group, _GROUPS),
        *map(_of_units, _UNITS),
        _variant("share_2.5", "fishertune", *_SHARE_OF_GROUP),
        *(_variant(f"{m}_fp", m, "TUNING.FEATURE_PERTURBATION", "True") for m in _PERTURBED),
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
        *(_variant(f"shift_{kind}", "fishertune", _KIND, kind) for kind in ("night", "mixed")),
    )
}


def find_entry(name: str) -> Entry:
    """Returns an entry of ``ENTRIES``, or the entry of the tuning method with this name."""
    return ENTRIES.get(name) or Entry(name, name, name, name)


def entry_names() -> list[str]:
    """Returns the name of every entry whose method is registered."""
    methods = [name for name, _ in TUNING_REGISTRY]
    variants = [entry.name for entry in ENTRIES.values() if entry.method in methods]
    return list(dict.fromkeys(methods + variants))


@dataclass(frozen=True)
class Table:
    """Entries that are compared with each other.

    Attributes:
        title: The title.
        entries: Names for ``find_entry``.
        vfms: The foundation models in the profile ``paper``.
        source: The folder of configs in the profile ``paper``, which fixes the training data:
            GTAV in configs/ itself. Tables of one folder share its models.
        test: The test sets in the profile ``paper``, with the source's own.
        search: Whether the learning rate of each entry is chosen first, if the profile has dev
            sets; False uses those of the configs.
        paper: The name of the table in paper.csv; "" if the paper has no numbers for it.
        averages: Whether the figure shows averages over unseen domains instead of data sets.
    """

    title: str
    entries: tuple[str, ...]
    vfms: tuple[str, ...] = ("dinov2_vitl", "eva02_vitl")
    source: str = ""
    test: tuple[str, ...] = ("cityscapes_val", "bdd100k_val", "mapillary_val")
    search: bool = True
    paper: str = ""
    averages: bool = False


_from_cityscapes = partial(
    Table, source="cityscapes/", test=("cityscapes_val", "bdd100k_val", "acdc_val")
)
_RIVALS = (FREEZE, "full", "lora", "soma", "adaptformer", "vpt", "vqt", "rein", "childtune")
_CITY_ENTRIES = (FREEZE, "full", "rein", "vqt", "childtune", "fishertune")
_TABLE_1 = Table(
    "Table 1: ways to tune, on each foundation model",
    entries=(*_RIVALS, "set", "fishertune"),
    vfms=("clip_vitl", "mae_vitl", "sam_vith", "eva02_vitl", "dinov2_vitl"),
    paper="table1",
)
TABLES: dict[str, Table] = {
    "table1": _TABLE_1,
    "table2": _from_cityscapes(
        "Table 2: from one city to others",
        entries=_CITY_ENTRIES,
        paper="table2",
    ),
    "table3": _from_cityscapes(
        "Table 3: adverse weather",
        entries=_CITY_ENTRIES,
        vfms=("dinov2_vitl",),
        test=(
            *("cityscapes_val", "foggy_zurich", "foggy_driving", "dark_zurich_val"),
            *("nighttime_driving", "acdc_rain_val", "acdc_snow_val"),
        ),
        paper="table3",
    ),
    "table4": _from_cityscapes(
        "Table 4: which weights to select",
        entries=(
            *(FREEZE, "full", "random", "random_q", "random_k", "random_v"),
            *("fisher", "delta_fisher", "fishertune"),
        ),
        paper="table4",
    ),
    "table5": Table(
        "Table 5: perturbed features in training (_fp)",
        entries=tuple(name + end for name in _PERTURBED for end in ("", "_fp")),
        paper="table5",
    ),
    "fig2": replace(
        _TABLE_1, title="Fig. 2: average by foundation model and way to tune", averages=True
    ),
    "fig3": _from_cityscapes(
        "Fig. 3: one kind in one third of the blocks, as many weights of each",
        entries=(FREEZE, *_GROUPS, "share_2.5"),
    ),
    "fig5": _from_cityscapes(
        "Fig. 5: plain and variational estimates, of F and of DRF",
        entries=("fisher", "fisher_variational", "fishertune", "variational"),
    ),
    # For docs/results/selection.md; docs/results/camvid.md says how its learning rates were chosen.
    "selection": Table(
        "Which weights to select",
        entries=(
            *(FREEZE, "full", "fishertune", "fisher", "delta_fisher", "random", "random_q"),
            *("random_k", "random_v", "eq7", "eq15", "rank", "share_1", "share_20", "smoothed"),
            *("natural", "variational", "fisher_variational", "sampled_labels"),
            *("shift_embedding", "shift_blocks"),
        ),
        search=False,
    ),
    # For the profiles of long training.
    "curves": Table(
        "Long training",
        entries=(
            *(FREEZE, "full", "lora", "soma", "childtune", "fishertune", "fishertune_20"),
            *("fishertune_neuron_rho1", "fishertune_neuron_20_rho1"),
        ),
        vfms=("dinov2_vitl",),
    ),
    # For docs/results/selection.md. Each row has a learning rate of its own.
    "units": Table(
        "Single weights or neurons",
        entries=(FREEZE, "full", "lora", "fishertune", "fisher", "random", *_UNITS),
        vfms=("dinov2_vitl",),
    ),
}
