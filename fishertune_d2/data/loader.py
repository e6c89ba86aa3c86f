"""Builds the loaders for training and test.

The images of training depend only on the seed and on the number of images drawn before, not on the
number of workers or on restarts. So a run resumes exactly, without worker state in its checkpoints:
set ``loader.sampler.start`` to the number of images already drawn.
"""

import os
import random
import signal
import threading
import warnings
from collections.abc import Callable, Sequence
from multiprocessing import get_all_start_methods, parent_process
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.data.common import DatasetFromList
from detectron2.data.samplers import InferenceSampler
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.samplers import DAFORMER, RareClass, ResumableSampler, build_sampler
from fishertune_d2.data.unlabelled import MixedSampler, Unlabelled

Mapper = Callable[[dict[str, Any]], dict[str, Any]]
_KNOWS_SENDERS = hasattr(signal, "sigwaitinfo")  # macOS does not
# Most workers of a process if their number follows the CPU cores. Eight map more than 100 images of
# GTAV's size per second (docs/results/data_loading.md), many times as many as a model trains on;
# each further worker holds two more batches in memory.
MOST_WORKERS = 8


class _MappedItems(Dataset[dict[str, Any]]):
    """Maps entries of a list; an error names the file."""

    def __init__(self, dicts: Sequence[dict[str, Any]], mapper: Mapper):
        if not dicts:
            raise ValueError("The list of data is empty: name data sets in DATASETS.")
        self.dicts = DatasetFromList(list(dicts))  # one buffer, not copied into each worker
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.dicts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.map(self.dicts[index])

    def map(self, item: dict[str, Any]) -> dict[str, Any]:
        """Maps one entry."""
        try:
            return self.mapper(item)
        except DatasetError:
            raise
        except Exception as error:
            raise DatasetError(
                f"{item['file_name']}: mapping it failed with {type(error).__name__}: {error}"
            ) from error


class _SeededItems(Dataset[dict[str, Any]]):
    """Maps an entry with random generators seeded by its position in the stream.

    The mapper gets the class for which the sampler drew the entry, if any, as ``drawn_for``.
    """

    def __init__(
        self,
        dicts: Sequence[dict[str, Any]],
        mapper: Mapper,
        seed: int,
        order: ResumableSampler,
        unlabelled: Sequence[dict[str, Any]] = (),
    ):
        self.items = _MappedItems([*dicts, *unlabelled], mapper)
        # Their file names go into a run's record.
        self.dicts = self.items.dicts if not unlabelled else DatasetFromList(list(dicts))
        self.unlabelled = unlabelled
        self.seed = seed
        self.order = order

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        position, index = key
        item, drawn_for = self.items.dicts[index], self.order.class_at(position)
        if drawn_for is not None:
            item = {**item, "drawn_for": drawn_for}
        # Without workers this is the training process. Its own generators must continue as if
        # nothing had been drawn here.
        numpy_state, python_state = np.random.get_state(), random.getstate()
        with torch.random.fork_rng(devices=[]):
            # Detectron2's transforms draw from numpy, its colour jitter from random.
            words = np.random.SeedSequence([self.seed, position]).generate_state(3)
            np.random.seed(words[0])
            random.seed(int(words[1]))
            torch.default_generator.manual_seed(int(words[2]))  # leaves the GPU's generators alone
            try:
                return self.items.map(item)
            finally:
                np.random.set_state(numpy_state)
                random.setstate(python_state)


class _Loader(DataLoader):
    """Starts workers with one OpenCV thread, and with SIGTERM blocked for `_outlive_schedulers`.

    The workers share the cores, so each uses one thread, as PyTorch does in workers. The number is
    set before they start: a fork has none of its parent's threads, and setting it there makes
    OpenCV wait for them forever.

    SIGTERM is blocked before the start, because PyTorch may start threads in a worker before the
    worker's init function runs. A thread inherits the mask of the thread that started it, and one
    thread that lets the signal through ends the process.
    """

    def __init__(
        self,
        items: Dataset[dict[str, Any]],
        order: Sampler[Any],
        batch_size: int,
        num_workers: int,
        pin_memory: bool,
    ):
        workers = count_workers(num_workers)
        super().__init__(
            items,
            batch_size=batch_size,
            sampler=order,
            num_workers=workers,
            # The platform's default, as under torchrun. Detectron2's launch spawns its processes,
            # and Python would spawn their workers as well: each would import everything again.
            multiprocessing_context=get_all_start_methods()[0] if workers else None,
            collate_fn=list,
            pin_memory=pin_memory,
            worker_init_fn=_outlive_schedulers,
            # The loader draws a base seed when iteration begins. Drawn from the global generator,
            # it would shift the random numbers of the model after a resume.
            generator=torch.Generator(),
        )

    def __iter__(self):
        if not self.num_workers:
            return super().__iter__()
        threads = cv2.getNumThreads()
        cv2.setNumThreads(1)
        if _KNOWS_SENDERS:
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            return super().__iter__()
        finally:
            if _KNOWS_SENDERS:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            cv2.setNumThreads(threads)


def count_workers(num_workers: int) -> int:
    """Returns how many worker processes a loader of this process starts; 0 maps in this process.

    Args:
        num_workers: DATALOADER.NUM_WORKERS. -1 means this process's share of the CPU cores that
            the run's processes on this machine may use, at least 1 and at most `MOST_WORKERS`.

    Raises:
        ValueError: if it is below -1.
    """
    if num_workers < -1:
        raise ValueError(
            f"DATALOADER.NUM_WORKERS is {num_workers}: choose -1 (this process's share of the CPU "
            f"cores, at most {MOST_WORKERS}), 0 (no worker processes) or their number."
        )
    if num_workers >= 0:
        return num_workers
    return min(max(count_cores() // comm.get_local_size(), 1), MOST_WORKERS)


def count_cores() -> int:
    """Returns the number of CPU cores for this process; a scheduler may give a job only some."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_train_loader(
    dicts: Sequence[dict[str, Any]],
    mapper: Mapper,
    *,
    batch_size: int,
    num_workers: int,
    seed: int,
    start: int | None = None,
    pin_memory: bool = False,
    sampler: str = "TrainingSampler",
    class_counts: np.ndarray | None = None,
    repeat_threshold: float = 0.0,
    rare_class: RareClass = DAFORMER,
    unlabelled: Unlabelled | None = None,
) -> DataLoader:
    """Builds an endless loader of shuffled, augmented batches.

    To resume, set ``loader.sampler.start`` before iteration begins, see `ResumableSampler`. A
    ValueError says that the ranks cannot share the batch evenly, there are no entries, the sampler
    is unknown or lacks its arguments, or ``num_workers`` is below -1.

    Args:
        dicts: Entries as `load_datasets` returns them.
        mapper: Turns an entry into tensors.
        batch_size: Images per step over all ranks.
        num_workers: Worker processes of each rank, see `count_workers`.
        seed: Seed of the order and of the augmentation, the same on every rank.
        start: The former way to set ``loader.sampler.start``.
        pin_memory: Returns tensors in pinned memory, for a model on a GPU.
        sampler: One of `SAMPLERS`: every image once in each epoch ("TrainingSampler"), images of
            rare classes more often ("RepeatFactorTrainingSampler"), or rare classes drawn first
            ("RareClassSampler").
        class_counts: (N, C + 1) pixels of the N entries by class, ignored pixels last; the last two
            samplers need them.
        repeat_threshold: For `RepeatFactorSampler`.
        rare_class: For `RareClassSampler`.
        unlabelled: Images without labels that join the stream, for self-training.

    Returns:
        A loader of lists of mapped dicts.
    """
    block = _images_of_a_rank(batch_size)
    order = build_sampler(
        sampler,
        len(dicts),
        seed=seed,
        block=block,
        class_counts=class_counts,
        repeat_threshold=repeat_threshold,
        rare_class=rare_class,
    )
    if unlabelled:
        order = MixedSampler(order, unlabelled)
    items = _SeededItems(dicts, mapper, seed, order, unlabelled.dicts if unlabelled else ())
    if start is not None:
        _set_former_start(order, start)
    return _Loader(items, order, block, num_workers, pin_memory)


def _images_of_a_rank(batch_size: int) -> int:
    """Returns the part of a batch that this rank loads."""
    world_size = comm.get_world_size()
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"A batch of {batch_size} images (SOLVER.IMS_PER_BATCH) cannot be shared evenly by "
            f"{world_size} processes; choose a multiple."
        )
    return batch_size // world_size


def _set_former_start(order: ResumableSampler, start: int) -> None:
    warnings.warn(
        "the argument start of build_train_loader is now set on the loader: "
        "loader.sampler.start = ...",
        FutureWarning,
        stacklevel=3,
    )
    order.start = start


def build_test_loader(
    dicts: Sequence[dict[str, Any]],
    mapper: Mapper,
    *,
    num_workers: int,
    pin_memory: bool = False,
) -> DataLoader:
    """Builds a loader of this rank's images, one at a time; see `build_train_loader`."""
    items = _MappedItems(dicts, mapper)
    return _Loader(items, InferenceSampler(len(dicts)), 1, num_workers, pin_memory)


def _outlive_schedulers(worker: int) -> None:
    """Lets a worker ignore SIGINT, and SIGTERM unless it comes from the training process.

    A scheduler sends SIGTERM to every process of a job, a terminal SIGINT to every process in its
    foreground. The training process answers by finishing its iteration, and needs its workers.
    """
    if not _KNOWS_SENDERS:
        return
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_await_own_sigterm, args=(parent_process().pid,), daemon=True).start()


def _await_own_sigterm(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(os.EX_OK)  # as PyTorch's own handler does, which would else report a failure
