import pytest
import torch
from detectron2.engine import default_argument_parser

from fishertune_d2.engine import launch


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
