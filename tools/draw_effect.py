#!/usr/bin/env python
"""Draws what tuning changes in unseen domains: image, label, frozen backbone, FisherTune.

The README's picture is drawn from two runs of the demo's config, which share one warm-up:

    D="--config-file configs/demo.yaml TEST.PICTURES 40"
    python train_net.py $D OUTPUT_DIR outputs/demo
    python train_net.py $D OUTPUT_DIR outputs/demo_freeze TUNING.METHOD freeze \
      TUNING.WARMUP_CHECKPOINT outputs/demo/model_warmup.pth
    python tools/draw_effect.py outputs/demo_freeze outputs/demo     # writes docs/images/effect.jpg

Of each domain it shows the scene in which FisherTune gains the median number of correct pixels over
the frozen backbone, so that no scene is picked by hand.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from fishertune_d2.analysis.page_figures import split_picture  # noqa: E402
from fishertune_d2.evaluation.label_pictures import find_pictures  # noqa: E402

PICTURE = ROOT / "docs/images/effect.jpg"
DOMAINS = ("dusk", "fog", "snow")
TITLES = ("unseen image", "label", "frozen backbone", "FisherTune")
PANEL = (400, 200)
MARGIN, GAP, HEAD = 64, 6, 36  # left of the panels, between them, above them


def median_scene(frozen: Path, tuned: Path, data_set: str) -> list[Image.Image]:
    """Chooses the scene with the median gain in correct pixels.

    Args:
        frozen: OUTPUT_DIR of the run with a frozen backbone.
        tuned: OUTPUT_DIR of the run of FisherTune.
        data_set: The name of a test set whose pictures both runs drew.

    Returns:
        The image, the label, the frozen backbone's prediction and FisherTune's.

    Raises:
        ValueError: if the runs did not draw the same pictures.
    """
    pictures = [find_pictures(run, data_set) for run in (frozen, tuned)]
    names = [[path.name for path in paths] for paths in pictures]
    if not names[0] or names[0] != names[1]:
        raise ValueError(
            f"{frozen} and {tuned} have different pictures of {data_set}: "
            "score both with the same TEST.PICTURES"
        )
    scenes = []
    for paths in zip(*pictures, strict=True):
        (image, label, before, _), (_, _, after, _) = map(split_picture, paths)
        gain = correct_pixels(after, label) - correct_pixels(before, label)
        scenes.append((gain, [image, label, before, after]))
    scenes.sort(key=lambda scene: scene[0])
    return scenes[len(scenes) // 2][1]


def correct_pixels(prediction: Image.Image, label: Image.Image) -> int:
    """Counts the pixels whose colour is the label's; black pixels of the label do not count."""
    predicted, true = np.asarray(prediction), np.asarray(label)
    return int(((predicted == true).all(axis=2) & (true > 0).any(axis=2)).sum())


def draw(scenes: Sequence[Sequence[Image.Image]]) -> Image.Image:
    """Draws the scenes as a table with titles.

    Args:
        scenes: For each domain the four panels.

    Returns:
        The picture.
    """
    width = MARGIN + len(TITLES) * (PANEL[0] + GAP)
    height = HEAD + len(scenes) * (PANEL[1] + GAP)
    picture = Image.new("RGB", (width, height), "white")
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(size=20)
    for k, title in enumerate(TITLES):
        centre = MARGIN + k * (PANEL[0] + GAP) + PANEL[0] / 2
        pen.text((centre, HEAD / 2), title, fill="black", font=font, anchor="mm")
    for i, (domain, panels) in enumerate(zip(DOMAINS, scenes, strict=True)):
        top = HEAD + i * (PANEL[1] + GAP)
        pen.text((MARGIN / 2, top + PANEL[1] / 2), domain, fill="black", font=font, anchor="mm")
        for k, panel in enumerate(panels):
            # Nearest keeps the colours of classes pure.
            way = Image.Resampling.LANCZOS if k == 0 else Image.Resampling.NEAREST
            picture.paste(panel.resize(PANEL, way), (MARGIN + k * (PANEL[0] + GAP), top))
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line; None takes that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("frozen", type=Path, help="OUTPUT_DIR of the run with a frozen backbone")
    parser.add_argument("tuned", type=Path, help="OUTPUT_DIR of the run of FisherTune")
    parser.add_argument("--output", type=Path, default=PICTURE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    scenes = [median_scene(args.frozen, args.tuned, f"streets_{name}_val") for name in DOMAINS]
    draw(scenes).save(args.output, quality=88, subsampling=0)
    print(args.output)


if __name__ == "__main__":
    main()
