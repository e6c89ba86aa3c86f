import multiprocessing
import random
import subprocess
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from detectron2.utils import comm

from fishertune_d2.data.files import DatasetError
from fishertune_d2.data.loader import ResumableSampler, build_test_loader, build_train_loader

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
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        ranks.append(list(islice(ResumableSampler(5, seed=1, block=2, start=4), 4)))
    assert ranks == [whole[4:6] + whole[8:10], whole[6:8] + whole[10:12]]
    with pytest.raises(ValueError, match="start is 6; .* a multiple of the 4 images"):
        next(iter(ResumableSampler(5, seed=1, block=2, start=6)))
    with pytest.raises(ValueError, match="batch of 3 images.*2 processes"):
        build_train_loader(DICTS, draw, batch_size=3, num_workers=0, seed=1)


def test_no_entries_are_an_error():
    with pytest.raises(ValueError, match="empty"):
        build_train_loader([], draw, batch_size=1, num_workers=0, seed=1)
    with pytest.raises(ValueError, match="empty"):
        build_test_loader([], draw, num_workers=0)


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
    for number in ["TERM", "INT"] * 10:
        subprocess.run(["kill", f"-{number}", str(worker.pid)], check=True)
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
