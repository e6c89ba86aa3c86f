"""Parts of the training sets that are held out to choose learning rates: ``HELD_OUT``.

A method must be chosen without the domains that it is tested on. So a search trains on most of the
source, and scores the rest: as it is, and shifted by `image_shifts`. The held-out images are whole
drives, because neighbouring frames of one drive look alike.
"""

from collections.abc import Callable
from dataclasses import replace

from fishertune_d2.data.dataset_description import SemSegDataset
from fishertune_d2.data.dataset_table import DATASETS

# Also the shifts of the dev sets, by their names' ends.
DEV_SHIFTS = ("fog", "night")

_GTAV_FIRST = 24_467  # the last 500 of the 24,966 frames, which follow each other in the game
_CITIES = ("ulm", "weimar", "zurich")  # 359 of Cityscapes' 2,975 images


def _in_gtav(stem: str) -> bool:
    return int(stem) >= _GTAV_FIRST


def _in_cityscapes(stem: str) -> bool:
    return stem.split("/")[0] in _CITIES


def _held_out(source: str, held: Callable[[str], bool]) -> tuple[SemSegDataset, ...]:
    """Describes the training part of a source, its held-out part, and that part shifted."""
    base = next(dataset for dataset in DATASETS if dataset.name == f"{source}_train")
    dev = replace(base, name=f"{source}_search_dev", keep=held, published=None)
    return (
        replace(dev, name=f"{source}_search_train", keep=lambda stem: not held(stem)),
        dev,
        *(
            replace(dev, name=f"{dev.name}_{shift}", shift=shift, domain=f"{source}_{shift}")
            for shift in DEV_SHIFTS
        ),
    )


# By source: the training part, and the dev sets.
HELD_OUT = {
    "gtav": _held_out("gtav", _in_gtav),
    "cityscapes": _held_out("cityscapes", _in_cityscapes),
}
