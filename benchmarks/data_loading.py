#!/usr/bin/env python
"""Times reading, resizing and cropping a training image, and compares the pixels of the methods.

    OMP_NUM_THREADS=1 python benchmarks/data_loading.py      # 2 minutes on one CPU core

The benchmark draws street scenes of GTAV's and of Cityscapes' size into a temporary folder. The
labels of GTAV's size have a palette, as in its authors' files. Each scene is mapped with many
seeds, once by `SegmentationMapper` and once by Detectron2's reader and transforms, which resize the
whole image before they crop it. Both draw the same random numbers. The methods take turns, and
times are CPU seconds of the process, so a busy machine changes them little. With --photos, the
benchmark also compares the resize methods on your own images. It writes
outputs/data_loading/data_loading.json and prints the tables of docs/results/data_loading.md.
"""

import argparse
import json
import random
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from unittest.mock import patch

import cv2
import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from evaluation import describe_machine
from PIL import Image
from tabulate import tabulate

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.config import default_config  # noqa: E402 - the package need not be installed
from fishertune_d2.data import SegmentationMapper, mapper  # noqa: E402
from fishertune_d2.data.image_files import load_image, read_image  # noqa: E402
from fishertune_d2.data.labels import LABEL_MAPS  # noqa: E402
from fishertune_d2.streets import render_scene  # noqa: E402

SIZES = {"GTAV": (1914, 1052), "Cityscapes": (2048, 1024)}
DETECTRON2, OURS = "Detectron2's reader and transforms", "SegmentationMapper"
IMAGE, LABEL, CROP, REST = "read the image", "read the label", "resize and crop", "all the rest"
PARTS = (IMAGE, LABEL, CROP, REST)
# The functions that our mapper calls, with the module of each and the part that counts its time.
CALLS = (
    (mapper, "load_image", IMAGE),
    (mapper, "read_label", LABEL),
    (SegmentationMapper, "_resized_part", CROP),
)
# Alternatives to Pillow's bilinear resize, which training and scoring use.
OPENCV = {"INTER_LINEAR": cv2.INTER_LINEAR, "INTER_AREA": cv2.INTER_AREA}


def draw(folder: Path, name: str, scene: int) -> dict:
    """Draws a scene and its label as train ids; saves the image as a JPEG too."""
    width, height = SIZES[name]
    image, label = render_scene(scene, size=(width, height))
    stem = folder / f"{name}_{scene}"
    Image.fromarray(image).save(f"{stem}.png")
    Image.fromarray(image).save(f"{stem}.jpg", quality=95)
    ids = Image.fromarray(label)
    if name == "GTAV":
        ids.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    ids.save(f"{stem}_label.png")
    return {
        "file_name": f"{stem}.png",
        "sem_seg_file_name": f"{stem}_label.png",
        "label_map": "train_ids",
        "height": height,
        "width": width,
    }


class Clock:
    """Measures the CPU time of each part of mapping one image."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, call: Callable) -> Callable:
        """Wraps a function so that its time is recorded."""

        def timed(*args, **kwargs):
            start = time.process_time()
            result = call(*args, **kwargs)
            self.seconds[part] = time.process_time() - start
            return result

        return timed


def map_as_detectron2(
    ours: SegmentationMapper, item: dict, clock: Clock
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes the image of our mapper by Detectron2's reader and transforms; labels are int64."""

    def read() -> np.ndarray:
        ids = np.asarray(Image.open(item["sem_seg_file_name"]))
        return LABEL_MAPS[item["label_map"]][ids].astype(np.uint8)

    def finish(given: T.AugInput) -> tuple[torch.Tensor, torch.Tensor]:
        ours.augmentations(given)
        image, label = ours._pad(given.image, given.sem_seg)
        image = np.ascontiguousarray(image.transpose(2, 0, 1))
        return torch.from_numpy(image), torch.from_numpy(label.astype(np.int64))

    image = clock.timed(IMAGE, detection_utils.read_image)(item["file_name"], "RGB")
    given = T.AugInput(image, sem_seg=clock.timed(LABEL, read)())
    clock.timed(CROP, T.AugmentationList([ours.resize, ours.crop]))(given)
    return clock.timed(REST, finish)(given)


def map_as_we(
    ours: SegmentationMapper, item: dict, clock: Clock
) -> tuple[torch.Tensor, torch.Tensor]:
    """Makes the image by `SegmentationMapper`."""
    with ExitStack() as stack:
        for owner, name, part in CALLS:
            call = clock.timed(part, getattr(owner, name))
            stack.enter_context(patch.object(owner, name, call))
        mapped = clock.timed(REST, ours)(item)
    clock.seconds[REST] -= sum(clock.seconds[part] for _, _, part in CALLS)
    return mapped["image"], mapped["sem_seg"]


def time_ways(items: Sequence[dict], seeds: int) -> dict[str, dict]:
    """Maps each image with each seed by both methods in turn; returns times and differences."""
    cfg = default_config()
    ours = SegmentationMapper(cfg, is_train=True)
    ways = {DETECTRON2: map_as_detectron2, OURS: map_as_we}
    times: dict[str, list[dict]] = {name: [] for name in ways}
    sent: dict[str, int] = {}
    for seed in range(seeds):
        for item in items:
            labels = []
            for name, way in ways.items():
                np.random.seed(seed)
                random.seed(seed)
                clock = Clock()
                image, label = way(ours, item, clock)
                times[name].append(clock.seconds)
                sent[name] = image.nbytes + label.nbytes
                labels.append(label.long())
            if not torch.equal(*labels):
                raise RuntimeError(f"the two methods crop {item['file_name']} differently")
    return {
        name: {part: 1000 * median(t[part] for t in taken) for part in PARTS}
        | {"all": 1000 * median(sum(t.values()) for t in taken), "bytes": sent[name]}
        for name, taken in times.items()
    }


def time_decoders(item: dict, rounds: int) -> dict[str, dict[str, float]]:
    """Times in ms how an image is decoded into an RGB array, or by Pillow into its own memory."""
    calls = {
        "Pillow": load_image,
        "Pillow, into an array": read_image,
        "OpenCV": lambda path: cv2.imread(path, cv2.IMREAD_COLOR_RGB),
    }
    paths = {"PNG": item["file_name"], "JPEG": item["file_name"].replace(".png", ".jpg")}
    seconds: dict[tuple[str, str], list[float]] = defaultdict(list)
    for _ in range(rounds):
        for name, call in calls.items():
            for kind, path in paths.items():
                start = time.process_time()
                call(path)
                seconds[name, kind].append(time.process_time() - start)
    return {name: {kind: 1000 * median(seconds[name, kind]) for kind in paths} for name in calls}


def compare_resizing(images: Iterable[np.ndarray], shrink: Sequence[float]) -> dict[str, dict]:
    """Measures how many grey levels other resize methods differ from Pillow's bilinear.

    Args:
        images: (H, W, 3) uint8.
        shrink: the factors by which the sides shrink.

    Returns:
        The largest and the mean difference in grey levels, by resize method.
    """
    worst: dict[str, int] = defaultdict(int)
    means: dict[str, list[float]] = defaultdict(list)
    for image in images:
        height, width = image.shape[:2]
        picture = Image.fromarray(image)
        for share in shrink:
            size = (round(share * width), round(share * height))
            whole = np.asarray(picture.resize(size, Image.Resampling.BILINEAR)).astype(int)
            left, top, right, bottom = (int(k * side) for k in (0.31, 0.83) for side in size)
            box = (left * width / size[0], top * height / size[1])
            box += (right * width / size[0], bottom * height / size[1])
            part = picture.resize((right - left, bottom - top), Image.Resampling.BILINEAR, box=box)
            others = {"the part alone": (whole[top:bottom, left:right], np.asarray(part))}
            for name, interpolation in OPENCV.items():
                others[name] = (whole, cv2.resize(image, size, interpolation=interpolation))
            for name, (expected, found) in others.items():
                difference = np.abs(expected - found)
                worst[name] = max(worst[name], int(difference.max()))
                means[name].append(float(difference.mean()))
    return {name: {"largest": worst[name], "mean": float(np.mean(means[name]))} for name in means}


def tables(result: Mapping) -> str:
    """Formats the tables of docs/results/data_loading.md."""
    times = []
    for part in (*PARTS, "all"):
        line = [part]
        for ways in result["ways"].values():
            line += [ways[DETECTRON2][part], ways[OURS][part]]
            line.append(ways[OURS][part] / ways[DETECTRON2][part])
        times.append(line)
    columns = [f"{size}, {way}" for size in result["ways"] for way in ("before", "ours", "ratio")]
    decoders = [[name, *kinds.values()] for name, kinds in result["decoders"].items()]
    resizing = [
        [images, name, found["largest"], found["mean"]]
        for images, ways in result["resizing"].items()
        for name, found in ways.items()
    ]
    return "\n\n".join(
        tabulate(lines, headers, tablefmt="github", floatfmt=formats)
        for lines, headers, formats in (
            (times, ["CPU ms per image", *columns], ("", *(".1f", ".1f", ".2f") * 2)),
            (decoders, ["decoder, CPU ms", "PNG", "JPEG"], ".1f"),
            (resizing, ["images", "way", "largest difference", "mean difference"], ".3f"),
        )
    )


def main(scenes: int, seeds: int, photos: Path | None, output: Path) -> None:
    """Runs the benchmark."""
    torch.set_num_threads(1)
    cv2.setNumThreads(1)  # as in a worker of a loader
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        items = {name: [draw(Path(folder), name, k) for k in range(scenes)] for name in SIZES}
        time_ways(items["GTAV"], 1)  # warms up
        result = {
            "machine": describe_machine(),
            "sizes": SIZES,
            "image_bytes": {
                name: median(Path(item["file_name"]).stat().st_size for item in of_size)
                for name, of_size in items.items()
            },
            "ways": {name: time_ways(of_size, seeds) for name, of_size in items.items()},
            "decoders": time_decoders(items["GTAV"][0], rounds=seeds),
        }
        sources = {"scenes of GTAV's size": ([items["GTAV"][0]["file_name"]], (0.25, 0.5, 0.75))}
        if photos is not None:
            files = sorted(path for path in photos.iterdir() if path.suffix in (".jpg", ".png"))
            sources[photos.parent.name] = (files[:20], (0.5, 2 / 3, 0.9))
        result["resizing"] = {
            name: compare_resizing(map(read_image, files), shrink)
            for name, (files, shrink) in sources.items()
        }
    (output / "data_loading.json").write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scenes", type=int, default=3, help="number of scenes of each size")
    parser.add_argument("--seeds", type=int, default=32, help="number of seeds for each scene")
    parser.add_argument(
        "--photos", type=Path, metavar="FOLDER", help="a folder of .jpg or .png images"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/data_loading")
    args = parser.parse_args()
    main(args.scenes, args.seeds, args.photos, args.output.resolve())
