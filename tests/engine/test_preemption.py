"""SIGTERM and SIGINT: a checkpoint, an exit code that says so, and a resumed run that goes on."""

import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm

from fishertune_d2.engine import Trainer
from fishertune_d2.engine.preemption import EXIT_CODE, SIGNALS, forwarding
from fishertune_d2.run import Run

from .conftest import EXACT, same_end, same_states, train


class _Signal(HookBase):
    """Sends this process a signal in the forward pass of an iteration."""

    def __init__(self, iteration: int, number: int = signal.SIGTERM):
        self.iteration = iteration
        self.number = number

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            self.trainer.segmentor.backbone.register_forward_pre_hook(
                lambda *_: os.kill(os.getpid(), self.number)
            )


def _last(cfg: CfgNode) -> tuple[str, int]:
    """The last checkpoint's name and iteration."""
    name = (Path(cfg.OUTPUT_DIR) / "last_checkpoint").read_text()
    return name, torch.load(Path(cfg.OUTPUT_DIR) / name, weights_only=True)["iteration"]


@pytest.fixture
def parts(tiny_cfg) -> CfgNode:
    """The config of a run that is disturbed, and saves only at its end."""
    return tiny_cfg("parts", SOLVER__CHECKPOINT_PERIOD=100)


def test_a_signal_ends_the_iteration_and_the_run_goes_on_from_there(parts, finished_run):
    handlers = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(SystemExit) as left:
        train(parts, _Signal(1, signal.SIGTERM))
    assert left.value.code == EXIT_CODE == 75
    assert _last(parts) == ("model_preempted.pth", 1)
    with pytest.raises(SystemExit) as left:
        train(parts, _Signal(4, signal.SIGINT), resume=True)
    assert left.value.code == EXIT_CODE
    assert _last(parts) == ("model_preempted.pth", 4)
    train(parts, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)
    assert [signal.getsignal(number) for number in SIGNALS] == handlers


def test_in_the_estimation_it_leaves_at_once(parts, finished_run):
    trainer = Trainer(parts)
    batches = trainer._estimation_batches()

    def interrupted():
        yield next(batches)
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    trainer._estimation_batches = interrupted
    with pytest.raises(SystemExit) as left:
        trainer.train()
    assert left.value.code == EXIT_CODE
    assert _last(parts) == ("model_warmup.pth", 2)
    train(parts, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)


def _stop(cfg, monkeypatch, iteration: int | None) -> None:
    """Trains until SIGTERM, in an iteration or, with None, in the first evaluation."""

    def interrupted(cfg, model):
        os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("went on")

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as left:
        patch.setattr(Trainer, "test", staticmethod(interrupted))
        train(cfg, *([] if iteration is None else [_Signal(iteration)]))
    assert left.value.code == EXIT_CODE


@pytest.mark.parametrize("when", ["in the last iteration", "in the evaluation"])
def test_an_evaluation_is_left_to_the_resumed_run(parts, finished_run, when, monkeypatch):
    _stop(parts, monkeypatch, 6 if when == "in the last iteration" else None)
    results = Path(parts.OUTPUT_DIR) / "results.json"
    assert not results.exists()
    train(parts, resume=True)
    assert same_end(finished_run, parts.OUTPUT_DIR)
    if EXACT:
        assert results.read_text() == (finished_run / "results.json").read_text()
    assert results.exists()


@pytest.mark.parametrize("when", ["in the iteration", "in the evaluation"])
def test_the_resumed_run_makes_up_for_an_evaluation_on_the_way(tiny_cfg, when, monkeypatch):
    options = {"SOLVER__EMA": 0.9, "TEST__EVAL_PERIOD": 5, "TEST__BEST_ON": "tiny_day"}
    whole, parts = (
        tiny_cfg(name, SOLVER__CHECKPOINT_PERIOD=100, **options) for name in ("whole", "parts")
    )
    train(whole)
    _stop(parts, monkeypatch, 4 if when == "in the iteration" else None)
    assert _last(parts) == ("model_preempted.pth", 4)
    train(parts, resume=True)
    assert same_end(whole.OUTPUT_DIR, parts.OUTPUT_DIR)
    for cfg in (whole, parts):
        Path(cfg.OUTPUT_DIR, "config.yaml").write_text(cfg.dump())  # as train_net.py does
    series = [Run(Path(cfg.OUTPUT_DIR)).score_series()["tiny_day"] for cfg in (whole, parts)]
    assert [[at for at, _ in each] for each in series] == [[5, 7]] * 2
    best = [
        torch.load(Path(cfg.OUTPUT_DIR, "model_best.pth"), weights_only=True)
        for cfg in (whole, parts)
    ]
    if EXACT:
        assert series[0] == series[1]
        assert best[0]["iteration"] == best[1]["iteration"]
        assert same_states(best[0]["model"], best[1]["model"])


def _rank(rank: int, rendezvous: Path, cfg: CfgNode, iteration: int) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    train(cfg, *([_Signal(iteration)] if rank == 1 else []), resume=True)


def test_processes_leave_after_the_same_iteration_if_one_is_told_to(
    tiny_cfg, parts, start_process, tmp_path
):
    whole = tiny_cfg("whole", MODEL__DEVICE="cpu")  # gloo, and two processes
    parts.MODEL.DEVICE = "cpu"

    def run(name: str, cfg: CfgNode, iteration: int) -> list[int]:
        arguments = tmp_path / name, cfg, iteration
        processes = [start_process(_rank, rank, *arguments) for rank in range(2)]
        for process in processes:
            process.join()
        return [process.exitcode for process in processes]

    assert run("undisturbed", whole, -1) == [0, 0]
    assert run("preempted", parts, 4) == [EXIT_CODE, EXIT_CODE]
    assert _last(parts) == ("model_preempted.pth", 4)
    assert run("resumed", parts, -1) == [0, 0]
    assert same_end(whole.OUTPUT_DIR, parts.OUTPUT_DIR)


def _wait_for_a_signal(ready: Path) -> None:
    for number in SIGNALS:
        signal.signal(number, lambda number, frame: os._exit(number))
    ready.touch()
    time.sleep(60)


def _wait_for_a_process(ready: Path) -> None:
    with forwarding():
        listening = ready.with_name("listening")
        process = multiprocessing.get_context("fork").Process(
            target=_wait_for_a_signal, args=(listening,)
        )
        process.start()
        while not listening.exists():
            time.sleep(0.01)
        ready.touch()  # not by the child, which may be ahead of the end of start()
        process.join()
    os._exit(100 + process.exitcode)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_process_that_waits_for_others_passes_the_signal_on(number, start_process, tmp_path):
    process = start_process(_wait_for_a_process, tmp_path / "ready")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(process.pid, number)
    process.join()
    assert process.exitcode == 100 + number
