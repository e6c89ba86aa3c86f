import os
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from detectron2.engine import default_argument_parser
from detectron2.utils import comm

from fishertune_d2.engine import launch
from fishertune_d2.engine.processes import _run

MODULE = sys.modules[_run.__module__]  # the package has a function of that name


@pytest.fixture
def under_torchrun(monkeypatch):
    """The environment of the second of three processes, on a machine with two GPUs."""
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 3, "LOCAL_WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def _unreached(args):
    raise AssertionError("main was run")


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "3 processes on this machine, which has 2 GPUs: .* MODEL.DEVICE cpu"),
        (["--num-gpus", "3"], "torchrun started 3 processes, and --num-gpus 3"),
        (["--num-machines", "2"], "--num-machines 2 asks for others: leave these out"),
    ],
)
def test_torchrun_in_contradiction_to_the_rest_is_refused(under_torchrun, options, message):
    args = default_argument_parser().parse_args(options)
    with pytest.raises(ValueError, match=message):
        launch(_unreached, args, device="cuda")


def test_without_torchrun_this_process_is_the_only_one(monkeypatch):
    # Set by other schedulers too, which start processes that know nothing of each other.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "3")
    seen = []
    args = default_argument_parser().parse_args([])
    launch(seen.append, args, device="cpu")
    assert seen == [args]
    assert not torch.distributed.is_initialized()


def _joined(rank: int, folder: Path, main) -> None:
    """Runs ``main`` as one of two processes of torchrun, and writes how it ended."""
    rendezvous = {"MASTER_ADDR": "localhost", "MASTER_PORT": (folder / "port").read_text()}
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    os.environ.update(rendezvous, **{name: str(number) for name, number in numbers.items()})
    MODULE._PATIENCE = 1
    try:
        launch(main, default_argument_parser().parse_args([]), device="cpu")
        end = "done"
    except BaseException as error:
        end = repr(error)
    end += ", in a group" if torch.distributed.is_initialized() else ""
    (folder / str(rank)).write_text(end)


def _work(args: Namespace) -> None:
    comm.all_gather(0)


def _fails(args: Namespace) -> None:
    if comm.get_rank() == 1:
        raise ZeroDivisionError
    comm.synchronize()


def _leaves(args: Namespace) -> None:
    raise SystemExit(75)


@pytest.mark.parametrize(
    "main, ends",
    [
        (_work, ("done", "done")),
        # The first waits for the second, and leaves the reason to it.
        (_fails, ("SystemExit(1)", "ZeroDivisionError()")),
        (_leaves, ("SystemExit(75)", "SystemExit(75)")),
    ],
)
def test_the_group_is_left_however_a_run_ends(start_process, tmp_path, free_tcp_port, main, ends):
    (tmp_path / "port").write_text(str(free_tcp_port))
    processes = [start_process(_joined, rank, tmp_path, main) for rank in range(2)]
    for rank, process in enumerate(processes):
        process.join()
        end = (tmp_path / str(rank)).read_text()
        assert end.startswith(ends[rank])
        assert "in a group" not in end


def test_a_process_leaves_though_the_others_do_not_answer(monkeypatch):
    monkeypatch.setattr(MODULE, "_PATIENCE", 0.1)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: time.sleep(100))
    start = time.monotonic()
    with pytest.raises(AssertionError, match="main was run"):
        _run(_unreached, None)
    assert time.monotonic() - start < 50


@pytest.mark.parametrize("device, seen", [("cpu", ""), ("cuda", "0,1")])
def test_processes_on_cpus_see_no_gpu_for_which_detectron2_would_take_nccl(
    monkeypatch, device, seen
):
    started = []

    def recorded(main, processes, *places, **options):
        started.append((main.func, main.args, processes, os.environ["CUDA_VISIBLE_DEVICES"]))

    monkeypatch.setattr(MODULE, "detectron2_launch", recorded)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    launch(_work, default_argument_parser().parse_args(["--num-gpus", "2"]), device=device)
    assert started == [(_run, (_work,), 2, seen)]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,1"
