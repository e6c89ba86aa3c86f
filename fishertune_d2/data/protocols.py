"""The table of evaluation protocols: ``PROTOCOLS``. A new protocol is one entry here.

A protocol is the way in which a line of the literature tests: the size of the images, the label map
and the size of the labels, and the classes that count. Scores of two protocols do not compare.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from detectron2.config import CfgNode

from fishertune_d2.config import equal_values, require_choice
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.data.metadata import is_size

Size = tuple[int, int]  # (width, height) in pixels
_Value = TypeVar("_Value")

# A config cannot say whether its TEST.CLASS_RULE is chosen: the default counts as not chosen.
_DEFAULT_RULE = "present"
_HALVED = frozenset(dataset.name for dataset in DATASETS if dataset.halve_labels)


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How test sets are scored.

    A pattern is the name of a data set in which ``*`` stands for any text. The first pattern that
    fits a name counts. A data set that no pattern fits is scored as it is registered.

    Attributes:
        name: The value of TEST.PROTOCOL; "" where the config sets each key itself.
        class_rule: The classes that count, see `fishertune_d2.evaluation.evaluator.class_ious`.
        sizes: (width, height) into which images are fitted, by pattern; None is the file's size.
        label_maps: Names in `LABEL_MAPS` that replace those of the registration, by pattern.
        native_labels: Whether labels are scored at the files' size even if a data set halves them.
        refused: Patterns of data sets whose names stand for the label map of another protocol.
    """

    name: str
    class_rule: str
    sizes: Mapping[str, Size | None]
    label_maps: Mapping[str, str] = field(default_factory=dict)
    native_labels: bool = False
    refused: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, cfg: CfgNode) -> "Protocol":
        """Returns the protocol that cfg.TEST.PROTOCOL names, or that cfg.TEST's other keys make.

        Raises:
            ValueError: if there is no such protocol, or TEST.SIZES, TEST.CLASS_RULE,
                TEST.NATIVE_LABELS or DATASETS.TEST contradict it.
        """
        test, sizes = cfg.TEST, read_test_sizes(cfg.TEST.SIZES)
        if not test.PROTOCOL:
            return cls(
                name="",
                class_rule=test.CLASS_RULE,
                sizes=sizes,
                native_labels=test.NATIVE_LABELS,
            )
        require_choice("TEST.PROTOCOL", test.PROTOCOL, PROTOCOLS)
        named = PROTOCOLS[test.PROTOCOL]
        troubles = [
            *named._other_sizes(sizes),
            *named._other_rules(test.CLASS_RULE, test.NATIVE_LABELS),
            *named._other_maps(cfg.DATASETS.TEST),
        ]
        if troubles:
            raise ValueError(
                f"TEST.PROTOCOL is {named.name}, and the config contradicts it: "
                f"{'; '.join(troubles)}. Leave this out, choose another protocol, or set "
                "TEST.PROTOCOL '' and choose each key yourself"
            )
        return replace(named, sizes={**sizes, **named.sizes})

    def sizes_of(self, names: Iterable[str]) -> dict[str, Size | None]:
        """Returns the test sizes of those data sets that the protocol names."""
        return _of_names(self.sizes, names)

    def label_maps_of(self, names: Iterable[str]) -> dict[str, str]:
        """Returns the label maps of those data sets whose map the protocol names."""
        return _of_names(self.label_maps, names)

    def fits(
        self,
        sizes: Mapping[str, Sequence[int] | None],
        halved: Collection[str],
        class_rule: str | None,
    ) -> bool:
        """Whether data sets were scored as in this protocol.

        Args:
            sizes: The test size of each data set.
            halved: The data sets whose labels were halved.
            class_rule: The rule of their scores.

        Returns:
            False also if the protocol does not name all of the data sets.
        """
        halves = set() if self.native_labels else _HALVED & sizes.keys()
        return (
            class_rule == self.class_rule
            and halves == set(halved)
            and not any(_first(self.refused, name) for name in sizes)
            and all(_first(self.sizes, name) for name in sizes)
            and all(equal_values(size, sizes[name]) for name, size in self.sizes_of(sizes).items())
        )

    def _other_sizes(self, sizes: Mapping[str, Size]) -> Iterator[str]:
        for name, own in self.sizes_of(sizes).items():
            if own != sizes[name]:
                yield f"TEST.SIZES tests {name} at {_text(sizes[name])} instead of {_text(own)}"

    def _other_rules(self, class_rule: str, native_labels: bool) -> Iterator[str]:
        if class_rule not in (_DEFAULT_RULE, self.class_rule):
            yield f"TEST.CLASS_RULE is {class_rule} instead of {self.class_rule}"
        if native_labels and not self.native_labels:
            yield "TEST.NATIVE_LABELS is True, and the protocol halves the labels of Mapillary"

    def _other_maps(self, names: Iterable[str]) -> Iterator[str]:
        for name in names:
            if _first(self.refused, name):
                chosen = self.label_maps_of([name])[name]
                yield (
                    f"DATASETS.TEST names {name}, which has another label map than the protocol's "
                    f"{chosen}"
                )


def _first(patterns: Iterable[str], name: str) -> str | None:
    return next((pattern for pattern in patterns if fnmatchcase(name, pattern)), None)


def _of_names(table: Mapping[str, _Value], names: Iterable[str]) -> dict[str, _Value]:
    found = {name: _first(table, name) for name in names}
    return {name: table[pattern] for name, pattern in found.items() if pattern is not None}


def _text(size: Size | None) -> str:
    return f"{size[0]} x {size[1]}" if size else "the file's size"


_FULL_CITYSCAPES = (2048, 1024)
_FULL_BDD = (1280, 720)
_FULL_HD = (1920, 1080)
_REIN_MAP = {"mapillary_*": "mapillary_v1.2_rein"}
_HRDA_MAP = {"mapillary_*": "mapillary_v1.2_hrda"}
_HRDA_NAMES = ("mapillary_*_hrda",)

# "union" is the rule of mmsegmentation, on which Rein, tqdm and HRDA are built.
PROTOCOLS: dict[str, Protocol] = {
    protocol.name: protocol
    for protocol in (
        # configs/_base_/datasets/dg_gta_512x512.py of w1oves/Rein. Rein tests ACDC at two sizes,
        # depending on the crop, so that TEST.SIZES may choose.
        Protocol(
            name="rein",
            class_rule="union",
            sizes={
                "cityscapes_*": (1024, 512),
                "bdd100k_*": _FULL_BDD,
                "mapillary_*": (1024, 512),
            },
            label_maps=_REIN_MAP,
            refused=_HRDA_NAMES,
        ),
        # The sizes of ByeongHyunPak/tqdm. Its conversion of Mapillary's labels is not published:
        # the map and the halved labels are those of ysj9909/SoMA, which tests at the same sizes.
        Protocol(
            name="tqdm",
            class_rule="union",
            sizes={
                "cityscapes_*": _FULL_CITYSCAPES,
                "bdd100k_*": _FULL_BDD,
                "mapillary_*": _FULL_CITYSCAPES,
            },
            label_maps=_REIN_MAP,
            refused=_HRDA_NAMES,
        ),
        # tools/test.py of the branch dg of lhoyer/HRDA, which tests BDD100K and Mapillary with the
        # pipeline of Cityscapes; ACDC and Dark Zurich have configs of their own.
        Protocol(
            name="hrda",
            class_rule="union",
            sizes={
                "cityscapes_*": _FULL_CITYSCAPES,
                "bdd100k_*": _FULL_CITYSCAPES,
                "mapillary_*": _FULL_CITYSCAPES,
                "acdc_*": _FULL_HD,
                "dark_zurich_*": _FULL_HD,
            },
            label_maps=_HRDA_MAP,
            native_labels=True,
        ),
        # Images and labels at the size of their files, and Detectron2's rule.
        Protocol(name="native", class_rule="present", sizes={"*": None}, native_labels=True),
    )
}


def fitting_protocol(
    sizes: Mapping[str, Sequence[int] | None], halved: Collection[str], class_rule: str | None
) -> str:
    """Returns the name of the only protocol that scores data sets so; "" if none or several do.

    See :meth:`Protocol.fits` for the arguments.
    """
    found = [name for name, each in PROTOCOLS.items() if each.fits(sizes, halved, class_rule)]
    return found[0] if sizes and len(found) == 1 else ""


def read_test_sizes(entries: Sequence[Any]) -> dict[str, Size]:
    """Returns TEST.SIZES as (width, height), keyed by the data set's name."""
    for entry in entries:
        if not (
            isinstance(entry, list | tuple)
            and entry
            and isinstance(entry[0], str)
            and is_size(entry[1:])
        ):
            raise ValueError(
                f"TEST.SIZES holds {entry!r}: write each entry as [name of a data set, width, "
                "height], in whole pixels, as [['cityscapes_val', 1024, 512]]"
            )
    return {name: (width, height) for name, width, height in entries}
