"""Scores one data set: adds up a confusion matrix, computes the mIoU, draws pictures.

Shapes: C classes of the model, K classes of the data set's label space, H, W the label's size.
"""

import logging
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm

from fishertune_d2.data.dataset_dicts import load_datasets
from fishertune_d2.data.image_files import DatasetError, read_image, read_label
from fishertune_d2.data.metadata import dataset_metadata
from fishertune_d2.data.protocols import Protocol
from fishertune_d2.evaluation.label_pictures import draw_comparison

_log = logging.getLogger(__name__)

CLASS_RULES = ("present", "union")


def confusion_matrix(labels: np.ndarray, predictions: np.ndarray, num_classes: int) -> np.ndarray:
    """Counts pixels by label and prediction, leaving out ignored labels.

    Args:
        labels: (H, W) uint8 classes, or ``IGNORE_LABEL``.
        predictions: (H, W) uint8 classes, or ``IGNORE_LABEL`` for a class that is not scored.
        num_classes: K.

    Returns:
        (K, K + 1) int64, rows are labels. The last column counts predictions of classes that are
        not scored: they belong to no class, but miss the label's class.
    """
    pairs = labels.astype(np.uint16) << 8 | predictions
    counts = np.bincount(pairs.ravel(), minlength=1 << 16).reshape(256, 256)[:num_classes]
    scored, others = counts[:, :num_classes], counts[:, num_classes:]
    return np.hstack([scored, others.sum(axis=1, keepdims=True)])


def class_ious(confusion: np.ndarray, class_rule: str) -> np.ndarray:
    """Computes the intersection over union of each class.

    Args:
        confusion: (K, K + 1) as `confusion_matrix` returns it.
        class_rule: "present" scores the classes that occur in labels; "union" scores the classes
            that occur in labels or predictions, so a class that is only predicted scores 0.

    Returns:
        (K,) float64 in 0..1; NaN for classes that the rule leaves out.
    """
    _require_rule(class_rule)
    labelled = confusion.sum(axis=1)
    predicted = confusion[:, :-1].sum(axis=0)
    hits = confusion.diagonal()
    union = labelled + predicted - hits
    scored = labelled > 0 if class_rule == "present" else union > 0
    return np.divide(hits, union, out=np.full(len(hits), np.nan), where=scored)


def _require_rule(class_rule: str) -> None:
    if class_rule not in CLASS_RULES:
        raise ValueError(f"TEST.CLASS_RULE is {class_rule!r}; it is one of {CLASS_RULES}.")


def best_classes(scores: torch.Tensor) -> np.ndarray:
    """Returns the (H, W) uint8 class of the highest of (C, H, W) scores, C at most 255."""
    # Equals argmax(dim=0), ties included (the first class wins), which on a CPU takes several times
    # as long over a first dimension. A download of uint8 has an eighth of int64's bytes.
    return scores.max(dim=0).indices.to(torch.uint8).cpu().numpy()


class DomainGeneralizationEvaluator(DatasetEvaluator):
    """Scores a data set in its own label space, at the size of its label files."""

    @configurable
    def __init__(
        self,
        dataset_name: str,
        *,
        class_rule: str = "present",
        output_dir: str | None = None,
        num_pictures: int = 0,
    ):
        """Prepares the counts. An unknown rule raises a ValueError.

        Args:
            dataset_name: A registered data set.
            class_rule: See `class_ious`.
            output_dir: Pictures go to its subfolder ``pictures``; None draws none.
            num_pictures: Number of images, spread over the data set, to draw beside their label
                and prediction.
        """
        _require_rule(class_rule)  # now, not after an hour of inference
        self.dataset_name = dataset_name
        self.class_rule = class_rule
        self.output_dir = output_dir
        self.space = dataset_metadata(dataset_name).label_space
        self._collapse = self.space.table()
        self._pictures = self._choose_pictures(num_pictures, output_dir) if output_dir else {}
        self.reset()

    @classmethod
    def from_config(
        cls, cfg: CfgNode, dataset_name: str, output_dir: str | None = None
    ) -> dict[str, Any]:
        """Reads cfg.TEST.PICTURES and, by `Protocol.from_config`, the class rule."""
        return {
            "dataset_name": dataset_name,
            "class_rule": Protocol.from_config(cfg).class_rule,
            "output_dir": output_dir,
            "num_pictures": cfg.TEST.PICTURES,
        }

    def reset(self) -> None:
        """Forgets all counts."""
        num_classes = len(self.space.classes)
        self.confusion = np.zeros((num_classes, num_classes + 1), dtype=np.int64)

    def process(self, inputs: Sequence[dict], outputs: Sequence[dict]) -> None:
        """Adds images to the counts.

        Args:
            inputs: Dicts of the data set.
            outputs: A dict for each image with ``sem_seg``, (C, H, W) scores.

        Raises:
            ValueError: if the scores do not fit the label's size or the label space.
        """
        for item, output in zip(inputs, outputs, strict=True):
            scores = output["sem_seg"]
            halve = item.get("halve_label", False)
            label = read_label(item["sem_seg_file_name"], item["label_map"], halve)
            if tuple(scores.shape) != (len(self.space.collapse), *label.shape):
                raise ValueError(
                    f"{self.dataset_name}: scores have shape {tuple(scores.shape)}, but "
                    f"{len(self.space.collapse)} classes and the size of "
                    f"{item['sem_seg_file_name']}, {label.shape}, are needed."
                )
            label = self._collapse[label]
            prediction = self._collapse[best_classes(scores)]
            self.confusion += confusion_matrix(label, prediction, len(self.space.classes))
            picture = self._pictures.get(_files(item))
            if picture is not None:
                image = read_image(item["file_name"])
                if image.shape[:2] != label.shape:  # scored on halved labels
                    size = label.shape[::-1]
                    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
                draw_comparison(image, label, prediction, self.space, picture)

    def evaluate(self) -> OrderedDict | None:
        """Sums the counts of all ranks and scores them.

        Returns:
            ``{"sem_seg": {"mIoU": x, "IoU-<class>": y, ...}}`` in percent, without the classes
            that the rule leaves out; None on all ranks but the first.

        Raises:
            DatasetError: on the first rank, if no scored pixel has a label.
        """
        counts = comm.gather(self.confusion)
        if not comm.is_main_process():
            return None
        confusion = np.sum(counts, axis=0)
        if not confusion.any():
            raise DatasetError(
                f"{self.dataset_name}: no labelled pixel, so there is nothing to score. Do its "
                "label files hold the ids of its classes, and not only ignored ones?"
            )
        ious = 100 * class_ious(confusion, self.class_rule)
        result = {"mIoU": float(np.nanmean(ious))}
        for name, iou in zip(self.space.classes, ious.tolist(), strict=True):
            if not np.isnan(iou):
                result[f"IoU-{name}"] = iou
        _log.info("%s: mIoU %.2f", self.dataset_name, result["mIoU"])
        return OrderedDict(sem_seg=result)

    def _choose_pictures(self, count: int, output_dir: str) -> dict[tuple[str, str], Path]:
        """Maps the pairs to draw, evenly spread, to picture files; image ids may not be unique."""
        if count < 1:
            return {}
        pairs = [_files(item) for item in load_datasets([self.dataset_name])]
        chosen = np.linspace(0, len(pairs) - 1, min(count, len(pairs))).round().astype(int)
        folder = Path(output_dir) / "pictures"
        return {pairs[i]: folder / f"{self.dataset_name}_{k}.png" for k, i in enumerate(chosen)}


def _files(item: dict[str, Any]) -> tuple[str, str]:
    return item.get("file_name", ""), item["sem_seg_file_name"]
