"""Two gloo processes that hold half of the batches each measure what one process measures."""

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import timm
import torch
from torch import nn

from fishertune_d2.fisher import (
    ESTIMATORS,
    FisherEstimate,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
)

ROOT = Path(__file__).resolve().parents[2]
# A process that does not load Detectron2 starts in half the time.
CODE = "import runpy, sys; sys.modules['detectron2'] = None; runpy.run_path({!r}, run_name='child')"
# natural makes each step together: a batch over two processes is not two batches of one.
ADDITIVE = ("diagonal", "diagonal_loop", "closed_form", "batch_mean", "variational")


def _measure(estimator: str, first: int, step: int, count: int = 4) -> FisherEstimate:
    """F over batches first, first + step, ... of ``count``."""
    torch.manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=16, patch_size=8, num_classes=3, embed_dim=8, depth=2, num_heads=2
    ).double()
    images = torch.randn(count, 2, 3, 16, 16, dtype=torch.float64)
    perturb = StatisticsPerturbation([model.blocks[0]], num_prefix_tokens=1)

    def loss(model, batch):
        labels = torch.zeros(len(batch), dtype=torch.int64)
        return nn.functional.cross_entropy(model(batch), labels, reduction="none")

    return estimate_fisher(
        model, list(images)[first::step], loss, find_candidates(model), estimator=estimator,
        perturb=perturb, progress=False,
    )  # fmt: skip


def _process(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    for estimator in ADDITIVE:
        _measure(estimator, rank, 2).save(Path(folder) / f"{estimator}_{rank}.safetensors")
    sent = {e: [_sent_bytes(e, rank, batches) for batches in (1, 3)] for e in ESTIMATORS}
    (Path(folder) / f"sent_{rank}.json").write_text(json.dumps(sent))
    torch.distributed.destroy_process_group()


def _sent_bytes(estimator: str, rank: int, batches: int) -> int:
    """What this process gives to sums over processes in an estimate of so many batches."""
    all_reduce = torch.distributed.all_reduce
    with patch.object(torch.distributed, "all_reduce", side_effect=all_reduce) as calls:
        _measure(estimator, rank, 2, 2 * batches)
    return sum(call.args[0].nbytes for call in calls.call_args_list)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", CODE.format(__file__)]
    children = [
        subprocess.Popen([*command, str(rank), str(folder)], env=environment) for rank in range(2)
    ]
    try:
        assert [child.wait(timeout=300) for child in children] == [0, 0]
    finally:
        for child in children:
            child.kill()
    return folder


@pytest.mark.parametrize("estimator", ADDITIVE)
def test_two_processes_measure_what_one_does(folder, estimator):
    one = _measure(estimator, 0, 1)
    for rank in range(2):
        two = FisherEstimate.load(folder / f"{estimator}_{rank}.safetensors")
        assert two.images == one.images == 8
        assert two.shift_weight == pytest.approx(one.shift_weight, rel=1e-6)
        for name in one:
            # atol: what float64 resolves of gamma * Lambda, for F by way of Lambda.
            torch.testing.assert_close(two[name], one[name], rtol=1e-9, atol=1e-15)
            torch.testing.assert_close(two.shifted[name], one.shifted[name], rtol=1e-9, atol=1e-15)


def test_f_is_sent_once_or_by_estimators_that_step_together_in_each_batch(folder):
    sent = json.loads((folder / "sent_1.json").read_text())
    on_x = _measure("diagonal", 0, 1)
    both = sum(value.nbytes for part in (on_x.f, on_x.shifted) for value in part.values())
    counts = 100  # bytes at most, of images and mean losses, in each batch
    for estimator, (one, three) in sent.items():
        sums = 3 if estimator == "natural" else 1
        assert both <= one <= both + counts, estimator
        assert sums * both <= three <= sums * one, estimator


if __name__ == "child":
    _process(int(sys.argv[1]), sys.argv[2])
