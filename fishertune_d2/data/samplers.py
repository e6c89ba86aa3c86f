"""Samplers: choose the training image at each position of the stream.

A position counts the images of all ranks since training began. The order depends only on the seed
and the position, so a run that resumes at a position continues as if it had not stopped.

Shapes: N entries, C classes. Class counts are (N, C + 1) pixels by class, ignored pixels last.
"""

import logging
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

import numpy as np
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm
from detectron2.utils.logger import log_first_n
from torch.utils.data import Sampler

SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RareClassSampler")
"""Choices of DATALOADER.SAMPLER_TRAIN."""

# Beyond these limits, rare class sampling trains on little but one class, or on too few images of a
# class.
_MOST_OF_ONE_CLASS = 0.9
_FEW_IMAGES = 3


class RareClass(NamedTuple):
    """How `RareClassSampler` draws.

    Attributes:
        temperature: A small one draws only the rarest classes, a large one all alike.
        min_pixels: Least pixels of a class in images that are drawn for it. If no image has as
            many, every image with a pixel of the class may be drawn.
    """

    temperature: float
    min_pixels: int


DAFORMER = RareClass(temperature=0.01, min_pixels=3000)


class ResumableSampler(Sampler[tuple[int, int]]):
    """An endless stream of shuffled epochs that can start anywhere.

    Yields (position, index); the index is an entry of the data set. Rank r takes the r-th block of
    each step's positions, so that a step draws the same images for any number of ranks.

    Args:
        size: Number of entries of the data set, N.
        seed: Seed of the order.
        block: Images of a rank in each step.

    Attributes:
        start: Images of all ranks that were drawn before, the position at which iteration begins.
    """

    def __init__(self, size: int, seed: int, block: int):
        self.size = size
        self.seed = seed
        self.block = block
        self.start = 0
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)  # of the epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yields (position, index) from ``start``; a start within a step raises a ValueError."""
        rank, step = comm.get_rank(), self.block * comm.get_world_size()
        if self.start < 0 or self.start % step:
            raise ValueError(
                f"start is {self.start}; it has to be a whole number of steps, so a multiple of "
                f"the {step} images that one draws."
            )
        for first in count(self.start + rank * self.block, step):
            for position in range(first, first + self.block):
                yield position, self.entry(position)

    def entry(self, position: int) -> int:
        """Returns the entry at a position: each epoch shows every entry once, in its own order."""
        epoch, place = divmod(position, self.size)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, _generator(self.seed, epoch).permutation(self.size)
        return int(self._order[place])

    def class_at(self, position: int) -> int | None:
        """Returns the class for which the entry at a position is drawn; None if for no class."""
        return None


class RepeatFactorSampler(ResumableSampler):
    """Shuffled epochs that show an image more often, the rarer its rarest class is.

    The factors are Detectron2's, from LVIS: a class that a share f of the images holds has the
    factor max(1, sqrt(threshold / f)), and an image has the largest factor of its classes. An epoch
    shows the image that often on average: each epoch draws anew whether to round up or down.

    Args:
        class_counts: (N, C + 1).
        threshold: DATALOADER.REPEAT_THRESHOLD, the share of the images below which a class is rare.
        seed: As in `ResumableSampler`, also block.
    """

    def __init__(self, class_counts: np.ndarray, threshold: float, seed: int, block: int):
        if not 0 < threshold <= 1:
            raise ValueError(
                f"DATALOADER.REPEAT_THRESHOLD is {threshold}: RepeatFactorTrainingSampler repeats "
                "images of classes that a smaller share of the images holds, so choose one above "
                "0 and at most 1, as 0.1"
            )
        super().__init__(len(class_counts), seed, block)
        images = [
            {"annotations": [{"category_id": c} for c in np.flatnonzero(pixels).tolist()]}
            for pixels in class_counts[:, :-1]
        ]
        factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            images, threshold
        )
        self.factors = factors.numpy().astype(np.float64)
        self._first = 0  # position at which the epoch begins

    def entry(self, position: int) -> int:
        """Returns the entry at a position, after counting the images of all epochs before it."""
        if position < self._first:
            self._epoch, self._first, self._order = -1, 0, self._order[:0]
        while position >= self._first + len(self._order):
            self._first += len(self._order)
            self._epoch += 1
            generator = _generator(self.seed, self._epoch)
            whole = np.floor(self.factors).astype(np.int64)
            times = whole + (generator.random(self.size) < self.factors - whole)
            self._order = generator.permutation(np.repeat(np.arange(self.size), times))
        return int(self._order[position - self._first])


class RareClassSampler(ResumableSampler):
    """Draws a class for each position, rare classes most often, then an image that holds it.

    This is the rare class sampling of DAFormer (temperature 0.01) and of tqdm (100): a class with a
    share f of all labelled pixels has the probability softmax((1 - f) / temperature). There are no
    epochs.

    Args:
        class_counts: (N, C + 1).
        seed: As in `ResumableSampler`, also block.
        options: The temperature, and the pixels that an image needs.
    """

    def __init__(
        self, class_counts: np.ndarray, seed: int, block: int, options: RareClass = DAFORMER
    ):
        temperature, min_pixels = options
        if temperature <= 0:
            raise ValueError(
                f"DATALOADER.RARE_CLASS_TEMPERATURE is {temperature}: choose a number above 0, "
                "such as 0.01 (DAFormer) or 100 (tqdm)"
            )
        super().__init__(len(class_counts), seed, block)
        pixels = class_counts[:, :-1]
        totals = pixels.sum(axis=0)
        self.classes = np.flatnonzero(totals)
        if not len(self.classes):
            raise ValueError("No label of the training data holds a labelled pixel.")
        weights = -totals[self.classes] / totals.sum() / temperature  # the 1 of 1 - f cancels
        weights = np.exp(weights - weights.max())
        self.probabilities = weights / weights.sum()
        self._images = [_images_with(pixels[:, c], min_pixels) for c in self.classes]
        self._mention_narrow_draws(100 * totals[self.classes] / totals.sum(), min_pixels)

    def _mention_narrow_draws(self, shares: np.ndarray, min_pixels: int) -> None:
        """Warns, once in a run, if training sees little but one class or few images of a class."""
        texts = []
        k = int(self.probabilities.argmax())
        if len(self.classes) > 1 and self.probabilities[k] > _MOST_OF_ONE_CLASS:
            texts.append(
                f"the class {self.classes[k]} is drawn for {100 * self.probabilities[k]:.0f} % of "
                f"the images, as it has {shares[k]:.1f} % of the labelled pixels and every other "
                "class has more"
            )
        k = min(range(len(self.classes)), key=lambda c: len(self._images[c]))
        few = len(self._images[k])
        if few < min(_FEW_IMAGES, self.size):
            texts.append(
                f"it draws only {few} image{'s' * (few > 1)} for the class {self.classes[k]} "
                f"({100 * self.probabilities[k]:.1f} % of the draws): only images with "
                f"{min_pixels} pixels of a class are drawn for it, or all images that hold it if "
                "none has as many"
            )
        if texts and comm.is_main_process():
            log_first_n(
                logging.WARNING,
                f"DATALOADER.SAMPLER_TRAIN is RareClassSampler: {'; '.join(texts)}. If you do "
                "not intend this, choose RepeatFactorTrainingSampler or TrainingSampler.",
                name=__name__,
                key="message",
            )

    def entry(self, position: int) -> int:
        """Returns the entry at a position, independent of all others."""
        generator, drawn = self._draw_class(position)
        return int(generator.choice(self._images[drawn]))

    def class_at(self, position: int) -> int:
        """Returns the class for which the entry at a position is drawn."""
        return int(self.classes[self._draw_class(position)[1]])

    def _draw_class(self, position: int) -> tuple[np.random.Generator, int]:
        """Returns the position's generator after the draw, and the place of the class."""
        generator = _generator(self.seed, position, 1)  # augmentation seeds with two numbers
        return generator, generator.choice(len(self.classes), p=self.probabilities)


def build_sampler(
    name: str,
    size: int,
    *,
    seed: int,
    block: int,
    class_counts: np.ndarray | None = None,
    repeat_threshold: float = 0.0,
    rare_class: RareClass = DAFORMER,
) -> ResumableSampler:
    """Builds the sampler of `SAMPLERS` that configs call ``name``.

    ``class_counts`` are those of the check, see `class_counts`; "TrainingSampler" needs none. For
    the other arguments see the samplers.

    Returns:
        The sampler.

    Raises:
        ValueError: if the name is unknown, or the counts are missing or of other data.
    """
    require_sampler(name)
    if name == "TrainingSampler":
        return ResumableSampler(size, seed, block)
    if class_counts is None or len(class_counts) != size:
        given = "none" if class_counts is None else f"those of {len(class_counts)}"
        raise ValueError(
            f"{name} needs the class counts of all {size} images, got {given}: pass "
            "class_counts=fishertune_d2.data.class_counts(names)"
        )
    if name == "RepeatFactorTrainingSampler":
        return RepeatFactorSampler(class_counts, repeat_threshold, seed, block)
    return RareClassSampler(class_counts, seed, block, rare_class)


def require_sampler(name: str) -> None:
    """Raises a ValueError if DATALOADER.SAMPLER_TRAIN is none of `SAMPLERS`."""
    if name not in SAMPLERS:
        raise ValueError(f"DATALOADER.SAMPLER_TRAIN is {name!r}: choose from {', '.join(SAMPLERS)}")


def _generator(*numbers: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(numbers))


def _images_with(pixels: np.ndarray, least: int) -> np.ndarray:
    enough = np.flatnonzero(pixels >= least)
    return enough if len(enough) else np.flatnonzero(pixels)
