#!/usr/bin/env python
"""Measures what tuning does to a backbone's features, for runs with one foundation model.

python tools/measure_forgetting.py OUTPUT_DIR [...] --data NAME [...] --output FILE.json

Each run's features are compared with those of the public backbone: their similarity by block on the
first data set, and how well a linear probe and the nearest patches find classes on each data set.
Both learn from the first half of the images and are tested on the second, so no class label of the
run's training is used, and no frame of a film is learned that the test shows a moment later. The
file gets the numbers, and a picture stands beside it.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.analysis.features import (  # noqa: E402
    blocks_of,
    features_of_modules,
    patch_features,
    read_images,
)
from fishertune_d2.analysis.forgetting import (  # noqa: E402 - it need not be installed
    IGNORED,
    draw_forgetting,
    linear_cka,
    neighbour_accuracy,
    patch_classes,
    probe_accuracy,
    table_of,
)
from fishertune_d2.command_line import ending_in_a_sentence  # noqa: E402
from fishertune_d2.config import read_config  # noqa: E402
from fishertune_d2.data.image_files import read_label  # noqa: E402
from fishertune_d2.engine import Trainer  # noqa: E402
from fishertune_d2.engine.trained_model import build_trained  # noqa: E402
from fishertune_d2.modeling import VFMSegmentor  # noqa: E402
from fishertune_d2.run import Results, Run  # noqa: E402

PUBLIC = "public backbone"


def read_models(runs: Sequence[Path]) -> Iterator[tuple[str, dict, VFMSegmentor]]:
    """Yields the public backbone of the first run, then each run's model, with name and facts."""
    start = read_config(str(Run(runs[0]).config_file), ["TUNING.METHOD", "freeze"])
    yield PUBLIC, {}, cast(VFMSegmentor, Trainer.build_model(start).eval())
    for folder in runs:
        run = Run(folder)
        model = build_trained(read_config(str(run.config_file)), str(run.checkpoint))
        record = Results.read(run.results_file).protocol
        facts = {key: record[key] for key in ("method", "seed", "iterations", "commit")}
        yield folder.name, facts, cast(VFMSegmentor, model)


def block_features(model: VFMSegmentor, images: Sequence[dict]) -> list[torch.Tensor]:
    """The features (n, D) of all patches of the images after each block."""
    of_blocks = features_of_modules(model, images, blocks_of(model.backbone))
    return [torch.cat([each.flatten(0, 1) for each in maps]) for maps in of_blocks]


def labelled_features(
    model: VFMSegmentor, images: Sequence[dict]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features (n, D) after the last block of all patches with a class, and the classes."""
    features, classes = [], []
    for image, map_ in zip(images, patch_features(model, images), strict=True):
        label = read_label(image["sem_seg_file_name"], image["label_map"])
        size = (image["image"].shape[-2], image["image"].shape[-1])
        of_image = patch_classes(label, size, model.backbone.size_divisibility)
        features.append(map_[of_image != IGNORED])
        classes.append(of_image[of_image != IGNORED])
    return torch.cat(features), torch.cat(classes)


def measure(runs: Sequence[Path], data: Sequence[str], count: int) -> list[dict]:
    """Returns the numbers of the public backbone and of each run, see ``table_of``."""
    cfg = read_config(str(Run(runs[0]).config_file))
    images = {name: read_images(cfg, name, count) for name in data}
    measured, public = [], None
    for name, facts, model in tqdm(read_models(runs), total=len(runs) + 1, unit="model"):
        blocks = block_features(model, images[data[0]][::4])
        public = public or blocks
        cka = [linear_cka(a, b) for a, b in zip(blocks, public, strict=True)]
        accuracy = {each: accuracies(model, images[each]) for each in data}
        measured.append({"name": name, **facts, "cka": cka, "accuracy": accuracy})
    return measured


def accuracies(model: VFMSegmentor, images: Sequence[dict]) -> dict[str, float]:
    """How well a probe and the nearest patches find the classes of the second half of images."""
    middle = len(images) // 2
    train, test = (labelled_features(model, half) for half in (images[:middle], images[middle:]))
    return {
        "probe": probe_accuracy(train, test),
        "neighbours": neighbour_accuracy(train, test),
    }


def main() -> None:
    """Measures, writes the file and draws the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, metavar="OUTPUT_DIR")
    parser.add_argument(
        "--data", nargs="+", required=True, help="registered data sets, unseen in training"
    )
    parser.add_argument("--images", type=int, default=64, help="how many of each data set (64)")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE.json")
    args = parser.parse_args()
    with ending_in_a_sentence():
        measured = measure(args.runs, args.data, args.images)
        result = {"data": args.data, "images": args.images, "models": measured}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        draw_forgetting(result, args.output.with_suffix(".png"))
        print(table_of(result))


if __name__ == "__main__":
    main()
