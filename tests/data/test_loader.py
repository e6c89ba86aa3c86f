import multiprocessing
import os
import random
import subprocess
import time
from collections import Counter
from itertools import islice

import cv2
import numpy as np
import pytest
import torch
from detectron2.utils import comm

from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.loader import (
    MOST_WORKERS,
    build_test_loader,
    build_train_loader,
    count_workers,
)
from fishertune_d2.data.samplers import ResumableSampler

DICTS = [{"file_name": f"{k}.png", "k": k} for k in range(5)]


def draw(item):
    """Maps an entry to its index and one number of each random generator."""
    return {"k": item["k"], "x": (np.random.rand(), random.random(), torch.rand(()).item())}


def fail(item):
    if item["k"] == 3:
        raise KeyError("something unforeseen")
    return item


def batches(start=0, count=6, num_workers=0, seed=7):
    loader = build_train_loader(DICTS, draw, batch_size=2, num_workers=num_workers, seed=seed)
    loader.sampler.start = start
    return list(islice(loader, count))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_fresh_loader_goes_on_where_another_stopped(num_workers):
    whole = batches(count=6)
    assert batches(start=6, count=3, num_workers=num_workers) == whole[3:]
    assert batches(count=6, num_workers=num_workers) == whole


def test_the_former_argument_start_still_works():
    with pytest.warns(FutureWarning, match="now set on the loader: loader.sampler.start"):
        loader = build_train_loader(DICTS, draw, batch_size=2, num_workers=0, seed=7, start=6)
    assert list(islice(loader, 3)) == batches(start=6, count=3)


def test_each_epoch_is_another_order_of_all_entries():
    epochs = np.array([item["k"] for batch in batches(count=10) for item in batch]).reshape(4, 5)
    assert (np.sort(epochs) == np.arange(5)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1
    other = [item["k"] for batch in batches(count=10, seed=8) for item in batch]
    assert other != epochs.ravel().tolist()


def test_every_position_draws_other_numbers():
    drawn = [item["x"] for batch in batches(count=10) for item in batch]
    assert Counter(drawn).most_common(1)[0][1] == 1


def test_the_generators_of_the_training_process_are_left_alone():
    def state():
        return np.random.get_state()[1].tolist(), random.getstate(), torch.get_rng_state().tolist()

    for num_workers in (0, 1):
        before = state()
        batches(num_workers=num_workers)
        assert state() == before


def test_ranks_share_each_step(monkeypatch):
    whole = list(islice(ResumableSampler(5, seed=1, block=4), 12))
    sampler = ResumableSampler(5, seed=1, block=2)
    sampler.start = 4
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        ranks.append(list(islice(sampler, 4)))
    assert ranks == [whole[4:6] + whole[8:10], whole[6:8] + whole[10:12]]
    sampler.start = 6
    with pytest.raises(ValueError, match="start is 6; .* a multiple of the 4 images"):
        next(iter(sampler))
    with pytest.raises(ValueError, match="batch of 3 images.*2 processes"):
        build_train_loader(DICTS, draw, batch_size=3, num_workers=0, seed=1)


def test_no_entries_are_an_error():
    with pytest.raises(ValueError, match="empty"):
        build_train_loader([], draw, batch_size=1, num_workers=0, seed=1)
    with pytest.raises(ValueError, match="empty"):
        build_test_loader([], draw, num_workers=0)


@pytest.mark.parametrize(
    ("cores", "processes", "workers"),
    [(2, 1, 2), (6, 2, 3), (7, 2, 3), (1, 4, 1), (64, 4, MOST_WORKERS)],
)
def test_the_processes_of_a_machine_share_its_cores(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    monkeypatch.setattr(comm, "get_local_size", lambda: processes)
    assert count_workers(-1) == workers
    assert (
        build_train_loader(DICTS, draw, batch_size=1, num_workers=-1, seed=1).num_workers
        == (build_test_loader(DICTS, draw, num_workers=-1).num_workers)
        == workers
    )
    assert [count_workers(number) for number in (0, 3, 40)] == [0, 3, 40]


def test_another_negative_number_of_workers_is_refused():
    for build in (
        lambda: build_train_loader(DICTS, draw, batch_size=1, num_workers=-2, seed=1),
        lambda: build_test_loader(DICTS, draw, num_workers=-2),
    ):
        with pytest.raises(ValueError, match="DATALOADER.NUM_WORKERS is -2: choose -1 .* cores"):
            build()


def test_a_worker_has_one_thread_though_the_training_process_has_a_pool():
    image, table = np.zeros((2000, 2000), np.uint8), np.arange(256, dtype=np.uint8)

    def work(item):
        cv2.LUT(image, table)
        return {"opencv": cv2.getNumThreads(), "torch": torch.get_num_threads()}

    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        cv2.LUT(image, table)  # starts them
        time.sleep(0.2)  # until they wait for work: one who joins them in a fork never returns
        loader = build_test_loader(DICTS, work, num_workers=1)
        assert all(batch == [{"opencv": 1, "torch": 1}] for batch in loader)
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)


def test_workers_of_a_spawned_process_are_not_spawned_as_well():
    default = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)  # as in a process of Detectron2's launch
    try:
        loader = build_train_loader(DICTS, draw, batch_size=2, num_workers=1, seed=7)
        assert loader.multiprocessing_context.get_start_method() == default
        assert list(islice(loader, 3)) == batches(count=3)
    finally:
        multiprocessing.set_start_method(default, force=True)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_only_tensors_are_pinned(monkeypatch, num_workers):
    """A stand-in for a GPU: what is pinned is not computed with, but counted."""
    item = {"file_name": "a.png", "image": torch.ones(2), "size": (3, None), "halve": False}
    item |= {"height": 3, "test_size": None, "label": torch.zeros(2, dtype=torch.uint8)}
    pinned = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
    monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda index: None)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    loaders = (
        build_test_loader([item], dict, num_workers=num_workers, pin_memory=True),
        build_train_loader(
            [item], dict, batch_size=1, num_workers=num_workers, seed=1, pin_memory=True
        ),
    )
    for loader in loaders:
        ((got,),) = islice(loader, 1)
        assert got.keys() == item.keys()
        assert all(
            torch.equal(a, b) if isinstance(b, torch.Tensor) else (a == b and type(a) is type(b))
            for a, b in ((got[key], item[key]) for key in item)
        )
        assert len(pinned) >= 2
        pinned.clear()


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_error_names_the_file(num_workers):
    loader = build_train_loader(DICTS, fail, batch_size=1, num_workers=num_workers, seed=1)
    with pytest.raises(DatasetError, match=r"3\.png: mapping it failed with KeyError"):
        list(islice(loader, 5))
    with pytest.raises(DatasetError, match=r"3\.png"):
        list(build_test_loader(DICTS, fail, num_workers=num_workers))


def test_a_worker_outlives_the_signals_of_a_scheduler_but_not_of_its_own_process():
    torch.set_num_threads(torch.get_num_threads())  # after it, workers have threads of their own
    loader = build_train_loader(DICTS, draw, batch_size=2, num_workers=1, seed=7)
    others = set(multiprocessing.active_children())
    drawn = iter(loader)
    got = [next(drawn)]
    (worker,) = set(multiprocessing.active_children()) - others
    often = "for _ in 0 1 2 3 4 5 6 7 8 9; do kill -TERM $0 && kill -INT $0 && sleep 0.02; done"
    subprocess.run(["sh", "-c", often, str(worker.pid)], check=True)
    got += list(islice(drawn, 5))
    assert got == batches(count=6)
    assert worker.is_alive()
    worker.terminate()
    worker.join(timeout=10)
    assert worker.exitcode == 0  # PyTorch takes every other code for a failure


@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_test_loader_goes_once_through_in_order(num_workers):
    loader = build_test_loader(DICTS, lambda item: item, num_workers=num_workers)
    assert [batch[0]["k"] for batch in loader] == [0, 1, 2, 3, 4]
    assert len(loader) == 5
