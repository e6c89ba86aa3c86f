"""Images without labels, which training mixes with the labelled ones once a teacher labels them.

The mix depends only on the position in the stream, as all training data do: after the first
labelled image come ``ratio`` unlabelled ones, and so on.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fishertune_d2.data.dataset_description import IMAGE_SUFFIXES
from fishertune_d2.data.file_search import find_files
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.samplers import ResumableSampler

# Other numbers than those of the labelled images' order.
_SEED_OFFSET = 1


class Unlabelled(NamedTuple):
    """Images without labels, and how they join the stream.

    Attributes:
        dicts: entries with a ``file_name`` and no ``sem_seg_file_name``.
        ratio: unlabelled images for each labelled one.
        begin: the position at which they join; before it all images are labelled.
    """

    dicts: Sequence[dict[str, Any]]
    ratio: int
    begin: int


class MixedSampler(ResumableSampler):
    """Labelled images in a sampler's own order, and unlabelled ones in shuffled epochs.

    Entries from the number of labelled images on are the unlabelled ones.

    Args:
        labelled: draws the labelled images, as if there were no others.
        unlabelled: the others.
    """

    def __init__(self, labelled: ResumableSampler, unlabelled: Unlabelled):
        super().__init__(len(unlabelled.dicts), labelled.seed + _SEED_OFFSET, labelled.block)
        self.labelled = labelled
        self.ratio = unlabelled.ratio
        self.begin = unlabelled.begin

    def entry(self, position: int) -> int:
        """Returns the entry at a position."""
        own, other = self._places(position)
        if own is not None:
            return self.labelled.entry(own)
        return self.labelled.size + super().entry(other)

    def class_at(self, position: int) -> int | None:
        """Returns the class for which a labelled entry is drawn; None for others."""
        own, _ = self._places(position)
        return None if own is None else self.labelled.class_at(own)

    def _places(self, position: int) -> tuple[int | None, int]:
        """Returns the place among the labelled images, or None and that among the unlabelled."""
        if position < self.begin:
            return position, 0
        turn, place = divmod(position - self.begin, 1 + self.ratio)
        if place == 0:
            return self.begin + turn, 0
        return None, turn * self.ratio + place - 1


def find_unlabelled(folder: str) -> list[dict[str, Any]]:
    """Finds all PNG and JPEG images in a folder and in folders below it, by path.

    Returns:
        Entries with ``file_name``.

    Raises:
        DatasetError: if there is none.
    """
    files = find_files([folder], IMAGE_SUFFIXES) if Path(folder).is_dir() else {}
    if not files:
        raise DatasetError(
            f"SELF_TRAINING.IMAGES is {folder}, and there is no such folder, or no image "
            f"(*{', *'.join(IMAGE_SUFFIXES)}) in it: name a folder of images."
        )
    return [{"file_name": files[name]} for name in sorted(files)]
