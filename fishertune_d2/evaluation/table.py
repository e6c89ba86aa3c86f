"""Summarizes the scores of several data sets: the source, the unseen domains, their average."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from tabulate import tabulate

from fishertune_d2.data.mapper import SegmentationMapper
from fishertune_d2.data.metadata import dataset_metadata

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def domains_overlap(one: str, other: str) -> bool:
    """Whether two domains are equal or one contains the other: "acdc" contains "acdc/fog"."""
    # The shorter path, if it matches to its end, names the whole.
    return all(a == b for a, b in zip(one.split("/"), other.split("/"), strict=False))


def summarize(
    results: Results,
    train_names: Sequence[str],
    protocol: Mapping[str, Any],
    mapper: SegmentationMapper,
) -> dict[str, Any]:
    """Sorts results into source and unseen domains, in a form that JSON can hold.

    Args:
        results: Results of each test set's evaluator, in percent.
        train_names: Training sets. A test set counts as source if its domain and the domain of a
            training set overlap. A name that is not registered in this process, because only the
            test data are here, is its own domain.
        protocol: Settings of the scoring (its name, inference mode, window, class rule, ...).
        mapper: The mapper of the test images, which knows their sizes and label maps.

    Returns:
        source and targets: mIoU by data set; target_average: the mean over targets, None without
        targets; per_class: IoU by data set and class; protocol: the given one, with each data set's
        test size (width, height; None is the file's size), label map and scored classes, and the
        data sets whose labels were halved.
    """
    train_domains = [dataset_metadata(n).domain if n in DatasetCatalog else n for n in train_names]
    metadata = {name: dataset_metadata(name) for name in results}
    source: dict[str, float] = {}
    targets: dict[str, float] = {}
    per_class: dict[str, dict[str, float]] = {}
    for name, result in results.items():
        scores = result["sem_seg"]
        domain = metadata[name].domain
        seen = any(domains_overlap(domain, trained) for trained in train_domains)
        group = source if seen else targets
        group[name] = scores["mIoU"]
        per_class[name] = {
            key.removeprefix("IoU-"): iou for key, iou in scores.items() if key.startswith("IoU-")
        }
    sizes = {name: mapper.test_sizes.get(name, m.test_size) for name, m in metadata.items()}
    maps = {name: mapper.label_maps.get(name, m.label_map) for name, m in metadata.items()}
    halved = [name for name, m in metadata.items() if m.halve_labels and not mapper.native_labels]
    return {
        "source": source,
        "targets": targets,
        "target_average": sum(targets.values()) / len(targets) if targets else None,
        "per_class": per_class,
        "protocol": {
            **protocol,
            "test_size": {name: list(size) if size else None for name, size in sizes.items()},
            "halved_labels": halved,
            "label_map": maps,
            "classes": {name: list(m.label_space.classes) for name, m in metadata.items()},
        },
    }


def all_scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """Returns the mIoU of every test set in a summary, source and unseen, in percent."""
    return {**summary["source"], **summary["targets"]}


def format_table(summary: Mapping[str, Any]) -> str:
    """Returns tables of a `summarize` result: mIoU by data set, then IoU by class and data set.

    They have a "-" where a data set does not score a class.
    """
    lines = [[name, "source", score] for name, score in summary["source"].items()]
    lines += [[name, "unseen", score] for name, score in summary["targets"].items()]
    lines.append(["average over unseen", "", summary["target_average"]])
    scores = tabulate(lines, ["data set", "domain", "mIoU"], floatfmt=".2f", missingval="-")

    names = [*summary["source"], *summary["targets"]]
    classes = dict.fromkeys(c for name in names for c in summary["protocol"]["classes"][name])
    per_class = tabulate(
        [[c, *(summary["per_class"][name].get(c) for name in names)] for c in classes],
        ["IoU", *names],
        floatfmt=".2f",
        missingval="-",
    )
    return f"{scores}\n\n{per_class}"
