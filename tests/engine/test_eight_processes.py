"""The recipes for 8 GPUs: the scaled keys, and all three stages in eight gloo processes."""

import hashlib
import json
from math import sqrt
from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode
from detectron2.utils import comm

from fishertune_d2.config import CONFIGS, read_config
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.start_check import require_possible
from fishertune_d2.run import Run

from .conftest import TINY

GPUS = 8
RECIPES = sorted((CONFIGS / "8gpu").glob("[!B]*.yaml"))
SMALL = {
    **TINY,
    "MODEL.DEVICE": "cpu",
    "TEST.PICTURES": 0,
    "SOLVER.AMP.ENABLED": False,
    "SOLVER.MAX_ITER": 4,
    "TUNING.WARMUP_ITERS": 2,
    "FISHER.BATCHES": GPUS,
    "FISHER.IMS_PER_BATCH": 2,
    "DATALOADER.NUM_WORKERS": 0,
}


def _require_scaled(one: CfgNode, eight: CfgNode, output: str) -> None:
    growth = eight.SOLVER.IMS_PER_BATCH / one.SOLVER.IMS_PER_BATCH
    assert growth > 1
    expected = dict(dotted_items(one)) | {
        "OUTPUT_DIR": output,
        "SOLVER.IMS_PER_BATCH": eight.SOLVER.IMS_PER_BATCH,
        "SOLVER.BASE_LR": pytest.approx(one.SOLVER.BASE_LR * sqrt(growth)),
    }
    # The keys of Detectron2's auto_scale_workers, and T1.
    for key in "SOLVER.MAX_ITER SOLVER.CHECKPOINT_PERIOD TEST.EVAL_PERIOD".split():
        expected[key] /= growth
    expected["SOLVER.WARMUP_ITERS"] /= growth
    expected["TUNING.WARMUP_ITERS"] /= growth
    assert dict(dotted_items(eight)) == expected
    require_possible(eight, GPUS)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_eight_times_the_gpus_see_as_many_images_with_a_rate_that_fits_the_batch(path):
    one, eight = read_config(str(CONFIGS / path.name)), read_config(str(path))
    _require_scaled(one, eight, f"outputs/8gpu/{path.stem}")


@pytest.mark.parametrize(
    ("name", "without_warmup"),
    [("fishertune_eva02", ""), ("full_clip", ""), ("rein_dinov2", "TUNING: {WARMUP_ITERS: 0}\n")],
)
def test_the_lines_in_the_head_of_the_base_scale_other_configs(tmp_path, name, without_warmup):
    bases = [str(CONFIGS / f"{name}.yaml"), str(CONFIGS / "8gpu/Base-8gpu.yaml")]
    path = tmp_path / "own.yaml"
    path.write_text(f"_BASE_: {json.dumps(bases)}\nOUTPUT_DIR: own\n{without_warmup}")
    _require_scaled(read_config(f"{name}.yaml"), read_config(str(path)), "own")


def test_a_batch_for_fewer_gpus_is_refused_with_the_remedies():
    cfg = read_config("fishertune_dinov2.yaml")
    with pytest.raises(ValueError, match="4 images .* by 8 processes") as error:
        require_possible(cfg, GPUS)
    assert "configs/8gpu/Base-8gpu.yaml" in str(error.value)
    assert "SOLVER.REFERENCE_WORLD_SIZE 4" in str(error.value)
    # That remedy works, too.
    cfg = read_config("fishertune_dinov2.yaml", ["SOLVER.REFERENCE_WORLD_SIZE", 4])
    require_possible(Trainer.auto_scale_workers(cfg, GPUS), GPUS)


def _train(rank: int, options: list, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=GPUS
    )
    comm.create_local_process_group(GPUS)
    trainer = Trainer(read_config("8gpu/fishertune_dinov2.yaml", options))
    trainer.train()
    digest = hashlib.sha256()
    for value in trainer.segmentor.state_dict().values():
        digest.update(value.numpy().tobytes())
    own_images = len(next(iter(trainer.data_loader)))
    (folder / f"{rank}.json").write_text(json.dumps([own_images, digest.hexdigest()]))
    comm.synchronize()  # gloo aborts a process that leaves while another one still computes
    torch.distributed.destroy_process_group()


def test_eight_processes_train_the_recipe_and_stay_equal(tiny_head, start_process, tmp_path):
    keys = SMALL | tiny_head | {"OUTPUT_DIR": str(tmp_path / "out")}
    options = [str(word) for pair in keys.items() for word in pair]
    processes = [start_process(_train, rank, options, tmp_path) for rank in range(GPUS)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * GPUS
    images, digests = zip(
        *(json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(GPUS)), strict=True
    )
    assert images == (2,) * GPUS  # 16 in a step
    assert len(set(digests)) == 1
    assert list(Run(tmp_path / "out").results.scores) == ["tiny_day", "tiny_night"]
