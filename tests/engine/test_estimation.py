"""The hook that estimates and selects, in two processes that do not measure the same."""

from pathlib import Path
from types import SimpleNamespace

import torch
from detectron2.utils import comm

from fishertune_d2.engine import FisherEstimation
from fishertune_d2.fisher import Selection


def _process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    scores = {"a": torch.tensor([1.0, 2.0 + rank]), "b": torch.tensor([2.5, 0.5])}
    hook = FisherEstimation(
        lambda: None, lambda estimate: scores, start=0, share=0.25, base=4, output_dir=folder
    )
    hook.trainer = SimpleNamespace(iter=0)
    hook.before_step()
    hook.selection.save(folder / f"{rank}.safetensors")
    torch.distributed.destroy_process_group()


def test_all_processes_train_what_the_first_one_selects(start_process, tmp_path):
    processes = [start_process(_process, rank, tmp_path) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, other = (Selection.load(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert one.indices["b"].tolist() == other.indices["b"].tolist() == [0]
