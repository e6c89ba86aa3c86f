#!/usr/bin/env python
"""Splits the time of an evaluation at 2048 x 1024, and times Detectron2's evaluator beside ours.

    OMP_NUM_THREADS=2 python benchmarks/evaluation.py       # 2 minutes on two CPU cores

The benchmark draws street scenes of Cityscapes' size, with Cityscapes' label ids, into a temporary
folder. It scores DINOv2 ViT-S on them as train_net.py does, and needs no data and no weights. It
writes outputs/evaluation/evaluation.json and prints the tables of docs/results/evaluation.md.
"""

import argparse
import json
import os
import platform
import re
import sys
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import mean, median
from unittest.mock import patch

import cv2
import detectron2
import numpy as np
import PIL
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import DatasetEvaluator, SemSegEvaluator
from detectron2.modeling import build_model
from PIL import Image
from tabulate import tabulate
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.config import default_config  # noqa: E402 - the package need not be installed
from fishertune_d2.data import load_datasets, mapper  # noqa: E402
from fishertune_d2.data.image_files import read_label  # noqa: E402
from fishertune_d2.data.labels import IGNORE_LABEL, LABEL_MAPS  # noqa: E402
from fishertune_d2.engine.scoring import score_datasets  # noqa: E402
from fishertune_d2.evaluation import DomainGeneralizationEvaluator, evaluator  # noqa: E402
from fishertune_d2.modeling import segmentor  # noqa: E402
from fishertune_d2.streets import render_scene  # noqa: E402

NAME = "cityscapes_val"
SIZE = (2048, 1024)
EGO_VEHICLE = 1  # the label id of the car's hood, the only ignored part of the scenes
MODEL, OUTSIDE, IMAGE, EVALUATE = "model", "outside the model", "image", "evaluate"
# The functions called for each image, with the module of each and the stage that counts its time.
CALLS: tuple[tuple[object, str, str], ...] = (
    (segmentor.VFMSegmentor, "forward", MODEL),
    (segmentor, "sliding_average", "windows"),
    (mapper, "load_image", "read the image"),
    (mapper, "fit_into", "resize the image"),
    (DomainGeneralizationEvaluator, "process", EVALUATE),
    (evaluator, "read_label", "read the label"),
    (evaluator, "confusion_matrix", "count pixels"),
    (evaluator, "read_image", "picture"),
    (evaluator, "draw_comparison", "picture"),
)


def draw_cityscapes(root: Path, images: int) -> None:
    """Draws scenes into Cityscapes' folders, with label ids and, for Detectron2, train ids."""
    label_ids = np.full(256, EGO_VEHICLE, dtype=np.uint8)
    for label_id, train_id in enumerate(LABEL_MAPS["label_ids"]):
        if 0 <= train_id < IGNORE_LABEL:
            label_ids[train_id] = label_id
    folders = [root / "cityscapes" / part / "val/streets" for part in ("leftImg8bit", "gtFine")]
    for folder in folders:
        folder.mkdir(parents=True)
    for k in range(images):
        image, label = render_scene(k, size=SIZE)
        for folder, suffix, pixels in (
            (folders[0], "leftImg8bit", image[..., ::-1]),
            (folders[1], "gtFine_labelIds", label_ids[label]),
            (folders[1], "gtFine_labelTrainIds", label),
        ):
            cv2.imwrite(str(folder / f"streets_000000_{k:06d}_{suffix}.png"), pixels)


def configure(output: Path, pictures: int) -> CfgNode:
    """Returns the paper's setting (windows of 512, stride 341, 1024 x 512 pixels), with ViT-S."""
    cfg = default_config()
    cfg.merge_from_file(str(ROOT / "configs/fishertune_dinov2.yaml"))
    cfg.merge_from_list(["MODEL.VFM.NAME", "dinov2_vits", "MODEL.VFM.WEIGHTS", "random"])
    cfg.merge_from_list(["MODEL.DEVICE", "cpu", "DATASETS.TEST", (NAME,)])
    # The config's own value is for GPUs.
    cfg.merge_from_list(["SOLVER.AMP.ENABLED", False, "TEST.WINDOWS_PER_BATCH", 1])
    # Without worker processes, no work outside the model runs in parallel to it.
    cfg.merge_from_list(["DATALOADER.NUM_WORKERS", 0, "TEST.PICTURES", pictures])
    cfg.OUTPUT_DIR = str(output)
    return cfg


class Timeline:
    """Splits the time of `score_datasets` by image, and the time of an image by stage."""

    def __init__(self) -> None:
        self.images: list[dict[str, float]] = []
        self.seconds = 0.0  # the time of the whole call
        self._stages: dict[str, float] = defaultdict(float)
        self._begin = 0.0

    def record(self, cfg: CfgNode, model: torch.nn.Module) -> None:
        """Scores the data set."""
        with ExitStack() as stack:
            for owner, name, stage in CALLS:
                call = self._timed(getattr(owner, name), stage)
                stack.enter_context(patch.object(owner, name, call))
            model.untrained = frozenset()  # the time does not depend on the weights
            start = self._begin = time.perf_counter()
            score_datasets(cfg, model)
            self.seconds = time.perf_counter() - start

    def _timed(self, call: Callable, stage: str) -> Callable:
        def timed(*args, **kwargs):
            start = time.perf_counter()
            result = call(*args, **kwargs)
            end = time.perf_counter()
            self._stages[stage] += end - start
            if (
                stage == EVALUATE
            ):  # the last stage of an image; the next image begins with its loading
                self.images.append({**self._stages, IMAGE: end - self._begin})
                self._stages.clear()
                self._begin = end
            return result

        return timed

    def summary(self) -> dict:
        """Returns ms by stage and the share outside the model; the first image only warms up."""
        images = [defaultdict(float, stages) for stages in self.images[1:]]
        drawn = [stages for stages in images if "picture" in stages]
        plain = [stages for stages in images if "picture" not in stages]
        for stages in plain:
            stages["scores to the label's size"] = stages[MODEL] - stages["windows"]
            counting = stages["read the label"] + stages["count pixels"]
            stages["argmax, scored classes"] = stages[EVALUATE] - counting
            stages[OUTSIDE] = stages[IMAGE] - stages[MODEL]
            known = ("read the image", "resize the image", EVALUATE)
            stages["loader and the rest"] = stages[OUTSIDE] - sum(stages[s] for s in known)
        milliseconds = {s: 1000 * median(stages[s] for stages in plain) for s in plain[0]}
        milliseconds["picture"] = 1000 * median(stages["picture"] for stages in drawn)
        return {
            "images": {"plain": len(plain), "drawn": len(drawn)},
            "milliseconds": milliseconds,
            "share_outside": {
                "plain": median(1 - s[MODEL] / s[IMAGE] for s in plain),
                "plain_highest": max(1 - s[MODEL] / s[IMAGE] for s in plain),
                "plain_with_resizing": median(1 - s["windows"] / s[IMAGE] for s in plain),
                "drawn": median(1 - s[MODEL] / s[IMAGE] for s in drawn),
                "whole_call": 1 - sum(s[MODEL] for s in self.images) / self.seconds,
            },
        }


def likely_scores(label: np.ndarray) -> Tensor:
    """Makes scores like a trained model's: correct except for blurred edges and wrong patches.

    A model with random weights predicts one class everywhere, which evaluators count faster.

    Args:
        label: (H, W) train ids.

    Returns:
        (19, H, W) float32, enlarged in two steps like the scores of sliding windows.
    """
    height, width = label.shape
    # A quarter of the test size, like the head's masks. The ignored 255 belongs to no class.
    small = torch.from_numpy(label[::8, ::8].astype(np.int64))
    right = F.one_hot(small.clamp(max=19), 20)[..., :19].permute(2, 0, 1)[None].float()
    blurred = F.avg_pool2d(right, 5, stride=1, padding=2)
    generator = torch.Generator().manual_seed(int(label.sum(dtype=np.int64)))
    wrong = torch.rand((1, 19, height // 64, width // 64), generator=generator)
    scores = blurred + 0.7 * F.interpolate(wrong, blurred.shape[-2:], mode="bilinear")
    scores = F.interpolate(scores, (height // 2, width // 2), mode="bilinear")
    return F.interpolate(scores, (height, width), mode="bilinear")[0]


def read_train_ids(path: str, dtype: type) -> np.ndarray:
    """Reads train ids as Detectron2 does, without ``copy=False``, which numpy 2 refuses."""
    return np.array(Image.open(path.replace("labelIds", "labelTrainIds")), dtype=dtype)


def make_evaluators() -> dict[str, DatasetEvaluator]:
    """Builds FisherTune's evaluator, Detectron2's, and Detectron2's without its boundary IoU."""
    plain = SemSegEvaluator(NAME, sem_seg_loading_fn=read_train_ids)
    plain._compute_boundary_iou = False  # there is no option; Detectron2 sets it without OpenCV
    evaluators = {
        "ours": DomainGeneralizationEvaluator(NAME, class_rule="present"),
        "SemSegEvaluator": SemSegEvaluator(NAME, sem_seg_loading_fn=read_train_ids),
        "SemSegEvaluator, no boundary IoU": plain,
    }
    for each in evaluators.values():
        each.reset()
    return evaluators


def items_and_scores() -> Iterator[tuple[dict, dict]]:
    """Yields the inputs and outputs that evaluators get, one image at a time."""
    for item in load_datasets([NAME]):
        label = read_label(item["sem_seg_file_name"], item["label_map"])
        yield item, {"sem_seg": likely_scores(label)}


def time_evaluators() -> dict[str, dict[str, float]]:
    """Times evaluators on the same scores, and returns their results."""
    evaluators = make_evaluators()
    seconds: dict[str, list[float]] = defaultdict(list)
    for item, output in items_and_scores():
        for name, each in evaluators.items():
            start = time.perf_counter()
            each.process([item], [output])
            seconds[name].append(time.perf_counter() - start)
    return {
        name: {
            "milliseconds": 1000 * median(seconds[name][1:]),  # the first image warms up
            "mIoU": each.evaluate()["sem_seg"]["mIoU"],
        }
        for name, each in evaluators.items()
    }


def weigh_evaluators() -> dict[str, dict[str, float]]:
    """Measures the memory that evaluators keep for each image, and their peak for one image."""
    result = {}
    for name, each in make_evaluators().items():
        kept, peaks = [], []
        for item, output in items_and_scores():
            tracemalloc.start()  # sees numpy's and Python's memory, not torch's
            each.process([item], [output])
            now, peak = tracemalloc.get_traced_memory()
            tracemalloc.stop()
            kept.append(now)
            peaks.append(peak)
        result[name] = {"kept_bytes": median(kept), "peak_bytes": max(peaks)}
    return result


def describe_machine() -> dict:
    """Describes the machine and the versions."""
    (cpu, *_) = re.findall(r"model name\s*: (.+)", Path("/proc/cpuinfo").read_text()) or ["unknown"]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "threads": {"torch": torch.get_num_threads(), "opencv": cv2.getNumThreads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "numpy": np.__version__,
            "opencv": cv2.__version__,
            "pillow": PIL.__version__,
            "detectron2": detectron2.__version__,
        },
    }


def tables(result: dict) -> str:
    """Formats the tables of docs/results/evaluation.md."""
    path = result["path"]
    stages = [
        [title, path["milliseconds"][title.removeprefix("- ")]]
        for title in (
            MODEL,
            "- windows",
            "- scores to the label's size",
            OUTSIDE,
            "- read the image",
            "- resize the image",
            "- read the label",
            "- argmax, scored classes",
            "- count pixels",
            "- loader and the rest",
            "picture",
        )
    ]
    shares = [
        [title, 100 * path["share_outside"][key]]
        for key, title in (
            ("plain", "no picture drawn: median over images"),
            ("plain_highest", "no picture drawn: highest"),
            ("plain_with_resizing", "no picture drawn, scores to the label's size counted too"),
            ("drawn", "picture drawn: median over images"),
            ("whole_call", "whole call, with its start, its end and the first image"),
        )
    ]
    ours = result["evaluators"]["ours"]["milliseconds"]
    evaluators = [
        [name, e["milliseconds"], e["milliseconds"] / ours, e["kept_bytes"] / 1024]
        + [e["peak_bytes"] / 2**20, e["mIoU"]]
        for name, e in result["evaluators"].items()
    ]
    columns = ["evaluator", "ms per image", "ratio", "keeps, KiB per image", "peak, MiB", "mIoU"]
    return "\n\n".join(
        tabulate(lines, headers, tablefmt="github", floatfmt=formats)
        for lines, headers, formats in (
            (stages, ["stage", "ms per image"], ".0f"),
            (shares, ["share outside the model", "%"], ".1f"),
            (evaluators, columns, ("", ".0f", ".1f", ".1f", ".0f", ".6f")),
        )
    )


def main(images: int, output: Path) -> None:
    """Runs the benchmark."""
    torch.manual_seed(0)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DETECTRON2_DATASETS"] = folder
        draw_cityscapes(Path(folder), images)
        files = [Path(item["file_name"]) for item in load_datasets([NAME])]
        cfg = configure(Path(folder), pictures=(images + 1) // 2)
        model = build_model(cfg)
        print("The files and the model are ready. Measuring.", flush=True)
        timeline = Timeline()
        timeline.record(cfg, model)
        times, weights = time_evaluators(), weigh_evaluators()
        result = {
            "machine": describe_machine(),
            "protocol": json.loads((Path(folder) / "results.json").read_text())["protocol"],
            "size": SIZE,
            "mean_image_bytes": mean(file.stat().st_size for file in files),
            "path": timeline.summary(),
            "evaluators": {name: times[name] | weights[name] for name in times},
        }
    (output / "evaluation.json").write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--images",
        type=int,
        default=7,
        help="an odd number: the first image warms up, and every second one is drawn",
    )
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/evaluation")
    args = parser.parse_args()
    main(args.images, args.output.resolve())
