#!/usr/bin/env python
"""Draws the effect of tuning in unseen domains: image, label, frozen backbone, FisherTune.

The README's picture is drawn from two runs of the demo's config, which share one warm-up:

    D="--config-file configs/demo.yaml TEST.PICTURES 40"
    python train_net.py $D OUTPUT_DIR outputs/demo
    python train_net.py $D OUTPUT_DIR outputs/demo_freeze TUNING.METHOD freeze \
      TUNING.WARMUP_CHECKPOINT outputs/demo/model_warmup.pth
    python tools/draw_effect.py outputs/demo_freeze outputs/demo     # writes docs/images/effect.jpg

For each domain, the picture shows the scene in which FisherTune gains the most correct pixels over
the frozen backbone. It also says in how many scenes FisherTune is better.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
MARGIN, GAP, HEAD = 104, 6, 36  # left of the panels, between them, above them


@dataclass(frozen=True)
class Domain:
    """The scenes of a domain.

    Attributes:
        panels: The image, the label, the prediction with the frozen backbone and the prediction of
            FisherTune, for the scene with the largest gain.
        better: The number of scenes in which FisherTune has more correct pixels.
        scenes: The number of scenes.
    """

    panels: Sequence[Image.Image]
    better: int
    scenes: int


def compare_scenes(frozen: Path, tuned: Path, data_set: str) -> Domain:
    """Compares the predictions of two runs, scene by scene.

    Args:
        frozen: OUTPUT_DIR of the run with a frozen backbone.
        tuned: OUTPUT_DIR of the run of FisherTune.
        data_set: The name of a test set whose pictures both runs drew.

    Returns:
        The counts, and the scene with the largest gain.

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
    _, panels = max(scenes, key=lambda scene: scene[0])
    return Domain(panels, sum(gain > 0 for gain, _ in scenes), len(scenes))


def correct_pixels(prediction: Image.Image, label: Image.Image) -> int:
    """Counts the pixels in the colour of the label; black pixels of the label do not count."""
    predicted, true = np.asarray(prediction), np.asarray(label)
    return int(((predicted == true).all(axis=2) & (true > 0).any(axis=2)).sum())


def draw(domains: Mapping[str, Domain]) -> Image.Image:
    """Draws a line of panels for each domain, with titles.

    Args:
        domains: The domains by name.

    Returns:
        The picture.
    """
    width = MARGIN + len(TITLES) * (PANEL[0] + GAP)
    height = HEAD + len(domains) * (PANEL[1] + GAP)
    picture = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(picture)
    large, small = (ImageFont.load_default(size=size) for size in (20, 16))
    for k, title in enumerate(TITLES):
        centre = MARGIN + k * (PANEL[0] + GAP) + PANEL[0] / 2
        pen.text((centre, HEAD / 2), title, fill="black", font=large, anchor="mm")
    for i, (name, domain) in enumerate(domains.items()):
        top = HEAD + i * (PANEL[1] + GAP)
        middle = top + PANEL[1] / 2
        pen.text((MARGIN / 2, middle - 24), name, fill="black", font=large, anchor="mm")
        counts = f"better in\n{domain.better} of {domain.scenes}"
        place = (MARGIN / 2, middle + 16)
        pen.multiline_text(place, counts, "dimgrey", small, anchor="mm", align="center")
        for k, panel in enumerate(domain.panels):
            # Nearest keeps the colours of classes pure.
            way = Image.Resampling.LANCZOS if k == 0 else Image.Resampling.NEAREST
            picture.paste(panel.resize(PANEL, way), (MARGIN + k * (PANEL[0] + GAP), top))
    return picture


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command.

    Args:
        arguments: The command line; None reads that of the process.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("frozen", type=Path, help="OUTPUT_DIR of the run with a frozen backbone")
    parser.add_argument("tuned", type=Path, help="OUTPUT_DIR of the run of FisherTune")
    parser.add_argument("--output", type=Path, default=PICTURE, help="default: %(default)s")
    args = parser.parse_args(arguments)
    domains = {
        name: compare_scenes(args.frozen, args.tuned, f"streets_{name}_val") for name in DOMAINS
    }
    draw(domains).save(args.output, quality=88, subsampling=0)
    print(args.output)


if __name__ == "__main__":
    main()
