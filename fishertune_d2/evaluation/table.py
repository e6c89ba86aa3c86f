"""One summary over data sets: the source, the unseen domains, and their average."""

from collections.abc import Mapping, Sequence
from typing import Any

from detectron2.data import DatasetCatalog
from tabulate import tabulate

from fishertune_d2.data.mapper import SegmentationMapper
from fishertune_d2.data.metadata import dataset_metadata

Results = Mapping[str, Mapping[str, Mapping[str, float]]]


def domains_overlap(one: str, other: str) -> bool:
    """Whether one domain equals, contains or lies within the other.

    Args:
        one: a path from the whole to its parts: "acdc" contains "acdc/fog".
        other: another such path.
    """
    # Compared to the end of the shorter path: if that is reached, it names the whole.
    return all(a == b for a, b in zip(one.split("/"), other.split("/"), strict=False))


def summarize(
    results: Results,
    train_names: Sequence[str],
    protocol: Mapping[str, Any],
    mapper: SegmentationMapper,
) -> dict[str, Any]:
    """Sorts results into source and unseen domains, ready to be written as JSON.

    Args:
        results: for each test set what its evaluator returned, in percent.
        train_names: the data sets trained on. A test set is a source if `domains_overlap` is
            true of its domain and one of theirs. The domain of a name that is not registered in
            this process, as where only the test data are, is that name.
        protocol: how the scores came about (inference mode, window, stride, class rule, ...).
        mapper: what the test images passed through; it knows their sizes.

    Returns:
        source and targets: mIoU by data set; target_average: the mean over targets, None where
        there are none; per_class: IoU by data set and class; protocol: as given, with the test
        size (width, height; None is the file's size) and the classes scored of each data set, and
        the data sets scored on halved labels.
    """
    train_domains = [dataset_metadata(n).domain if n in DatasetCatalog else n for n in train_names]
    metadata = {name: dataset_metadata(name) for name in results}
    source, targets, per_class = {}, {}, {}
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
            "classes": {name: list(m.label_space.classes) for name, m in metadata.items()},
        },
    }


def all_scores(summary: Mapping[str, Any]) -> dict[str, float]:
    """The mIoU of every test set, source and unseen, in percent.

    Args:
        summary: what `summarize` returned, or `results.json` holds.
    """
    return {**summary["source"], **summary["targets"]}


def format_table(summary: Mapping[str, Any]) -> str:
    """Formats a summary for the log: mIoU by data set, then IoU by class and data set.

    Args:
        summary: what `summarize` returned.

    Returns:
        Lines of text; "-" where a data set does not score a class.
    """
    rows = [[name, "source", score] for name, score in summary["source"].items()]
    rows += [[name, "unseen", score] for name, score in summary["targets"].items()]
    rows.append(["average over unseen", "", summary["target_average"]])
    scores = tabulate(rows, ["data set", "domain", "mIoU"], floatfmt=".2f", missingval="-")

    names = [*summary["source"], *summary["targets"]]
    classes = dict.fromkeys(c for name in names for c in summary["protocol"]["classes"][name])
    per_class = tabulate(
        [[c, *(summary["per_class"][name].get(c) for name in names)] for c in classes],
        ["IoU", *names],
        floatfmt=".2f",
        missingval="-",
    )
    return f"{scores}\n\n{per_class}"
