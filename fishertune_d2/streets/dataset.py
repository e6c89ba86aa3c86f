"""The built-in data set: generated street scenes with all 19 classes in six domains.

``render_scene`` renders one picture with its label. ``write_streets`` writes a data set in the
folder layout of Cityscapes, with domains in place of cities. ``ensure_streets`` writes the data set
that the project trains and tests on, as does the command::

    python -m fishertune_d2.streets --output datasets/streets

The source domain is day; only day has a training split. All domains have a validation split of the
same seeds, which training does not use, so that scores by day and at night compare the same
streets. A seed gives the same bytes in every run. Between machines, floating-point routines may
round the last bit of an image differently, but not of a label.
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from .scene import draw_scene
from .weather import LOOKS, render_domain

DOMAINS = ("day", "dusk", "night", "fog", "rain", "snow")

# Raise it with every change that alters a picture, so that older data sets are generated anew.
GENERATOR_VERSION = "2"
VERSION_FILE = "GENERATOR_VERSION"

# Cityscapes' 2:1 at a quarter of its side. Two CPU cores make the data set in one to two minutes
# and train on it in a few, and a person at 30 m is still 20 pixels tall.
SIZE = (512, 256)
COUNTS = {("train", "day"): 240, **{("val", domain): 40 for domain in DOMAINS}}
FIRST_SEED = {"train": 0, "val": 1_000_000}

_Job = tuple[str, str, int]  # split, domain and index of a scene


def render_scene(
    seed: int, domain: str = "day", size: tuple[int, int] = SIZE
) -> tuple[np.ndarray, np.ndarray]:
    """Renders one scene.

    Args:
        seed: Number of the scene, at least 0; its label does not depend on the domain.
        domain: One of ``DOMAINS``.
        size: Width and height in pixels.

    Returns:
        Image (H, W, 3) uint8 RGB, and label (H, W) uint8: Cityscapes train ids, 255 for the hood
        of the camera's car.

    Raises:
        ValueError: if there is no such domain.
    """
    if domain not in LOOKS:
        raise ValueError(f"No domain {domain!r} of built-in streets; choose one of {DOMAINS}.")
    return render_domain(draw_scene(seed), domain, size)


def write_streets(
    root: Path,
    progress: bool = True,
    size: tuple[int, int] = SIZE,
    counts: Mapping[tuple[str, str], int] = COUNTS,
    workers: int = 2,
) -> None:
    """Writes a whole data set or nothing.

    It grows in a folder beside ``root`` that is renamed when it is complete, so that a killed run
    leaves no half data set and two runs at once do not mix theirs. The files are
    ``leftImg8bit/<split>/<domain>/<domain>_000000_<index>_leftImg8bit.png`` and
    ``gtFine/<split>/<domain>/<domain>_000000_<index>_gtFine_labelTrainIds.png``.

    Args:
        root: The folder to make; a data set of another version there is replaced.
        progress: Whether to show a bar if standard error is a terminal.
        size: Width and height of the images in pixels.
        counts: Images per (split, domain); a split is "train" or "val".
        workers: Number of processes that render; 1 renders in the calling process.

    Raises:
        FileExistsError: if ``root`` holds something that is not a generated data set.
    """
    root = Path(root)
    if root.exists() and any(root.iterdir()) and not (root / VERSION_FILE).is_file():
        raise FileExistsError(
            f"{root} exists and holds no built-in streets (no file {VERSION_FILE}); it is left as "
            "it is. Remove it or name another folder."
        )
    root.parent.mkdir(parents=True, exist_ok=True)
    growing = Path(tempfile.mkdtemp(prefix=f".{root.name}-", dir=root.parent))
    try:
        jobs = [(*part, index) for part, count in counts.items() for index in range(count)]
        for split, domain in counts:
            for kind in ("leftImg8bit", "gtFine"):
                (growing / kind / split / domain).mkdir(parents=True)
        work = partial(_write_one, growing, size)
        written = _in_processes(work, jobs, workers)
        about = f"Generating street scenes in {root}"
        quiet = None if progress else True  # None: a bar only on a terminal
        list(tqdm(written, about, len(jobs), disable=quiet, unit="image"))
        (growing / VERSION_FILE).write_text(GENERATOR_VERSION + "\n")
        growing.chmod(0o755)  # mkdtemp makes it private
        _move_in_place(growing, root)
    finally:
        shutil.rmtree(growing, ignore_errors=True)


def _in_processes(work: Callable[[_Job], None], jobs: list[_Job], workers: int) -> Iterator[None]:
    """Does the jobs in so many processes, or in this one for 1; yields after each."""
    if workers == 1:
        yield from map(work, jobs)
        return
    # "spawn": a caller may have threads (torch does), which are broken in a forked child. Each
    # process has one thread of OpenCV, because the processes are the parallelism.
    with ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=cv2.setNumThreads, initargs=(1,)
    ) as pool:
        yield from pool.map(work, jobs, chunksize=4)


def _write_one(folder: Path, size: tuple[int, int], job: _Job) -> None:
    split, domain, index = job
    image, label = render_scene(FIRST_SEED[split] + index, domain, size)
    name = f"{split}/{domain}/{domain}_000000_{index:06d}"
    for path, picture in (
        (f"leftImg8bit/{name}_leftImg8bit.png", image[..., ::-1]),
        (f"gtFine/{name}_gtFine_labelTrainIds.png", label),
    ):
        if not cv2.imwrite(str(folder / path), picture):
            raise OSError(f"Cannot write {folder / path}; is the disk full?")


def _move_in_place(complete: Path, root: Path) -> None:
    """Renames the folder to ``root`` and replaces an old version; keeps a faster run's data set."""
    if root.exists() and not _is_current(root):
        aside = Path(tempfile.mkdtemp(prefix=f".{root.name}-old-", dir=root.parent))
        os.replace(root, aside)
        shutil.rmtree(aside, ignore_errors=True)
    try:
        os.replace(complete, root)
    except OSError:
        if not _is_current(root):
            raise


def _is_current(root: Path) -> bool:
    marker = root / VERSION_FILE
    return marker.is_file() and marker.read_text().strip() == GENERATOR_VERSION


def ensure_streets(root: Path, counts: Mapping[tuple[str, str], int] | None = None) -> Path:
    """Generates the data set at ``root`` unless it exists in this version.

    Args:
        root: The folder.
        counts: Images per (split, domain) that it must have. By default an existing data set may
            have any number, and a new one has ``COUNTS``.

    Returns:
        ``root``.

    Raises:
        FileExistsError: if the data set exists with other numbers of images than ``counts``.
    """
    root = Path(root)
    if not _is_current(root):
        write_streets(root, counts=counts or COUNTS)
        return root
    for (split, domain), count in (counts or {}).items():
        found = len(list((root / "leftImg8bit" / split / domain).glob("*.png")))
        if found != count:
            raise FileExistsError(
                f"{root} holds {found} images of {split}/{domain}, not {count}; it is left as it "
                f"is. Remove it to generate {count}, or name another folder."
            )
    return root


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description="Write the built-in street scenes.")
    parser.add_argument("--output", type=Path, required=True, help="folder to make")
    parser.add_argument(
        "--images",
        type=int,
        help="images in each split and domain (default: 240 to train on, 40 for each test set)",
    )
    arguments = parser.parse_args()
    if arguments.images is not None and arguments.images < 1:
        parser.error(f"--images is {arguments.images}: choose at least 1")
    counts = None if arguments.images is None else dict.fromkeys(COUNTS, arguments.images)
    root = ensure_streets(arguments.output, counts)
    print(f"Street scenes (generator version {GENERATOR_VERSION}) are in {root.resolve()}")
