"""Counts the operators, waits and uploads of a training step of a config, as on a GPU.

python tools/fake_cuda -m fake_cuda.count_steps configs/fishertune_dinov2.yaml --details
python tools/fake_cuda -m fake_cuda.count_steps CONFIG --methods full fishertune --opts KEY VALUE

The model has as many blocks and layers as the config says, but narrow ones, and the images are
small. The counts depend on neither. The count of an iteration includes its hooks.
"""

import argparse
import logging
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from PIL import Image

from fake_cuda.counts import COUNTS, Counts, counting
from fishertune_d2.config import read_config
from fishertune_d2.data import register_sem_seg
from fishertune_d2.engine import Trainer
from fishertune_d2.modeling.vfm import VFMS

DATASET, CLASSES, SIDE = "fake_cuda_squares", 19, 64
WARMUP, LINES = 2, 14
NARROW = {
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.NHEADS": 4,
    "MODEL.MASK_FORMER.DIM_FEEDFORWARD": 32,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
}


@dataclass
class StepCounts:
    """The counts of one training.

    Attributes:
        iterations: the counts of each iteration in turn. The first iteration of the tuning stage
            includes the estimation, and the last one includes the writing of the log.
        warmup: the number of iterations of the warm-up.
        evaluation: the counts of the segmentor on one image, before the last iteration.
    """

    iterations: list[Counts]
    warmup: int
    evaluation: Counts

    @property
    def tuning(self) -> list[Counts]:
        """The iterations of the tuning stage, without the first."""
        return self.iterations[self.warmup + 1 :]


class _Watch(HookBase):
    """Splits the counts between iterations; runs before all other hooks."""

    def __init__(self, evaluate_at: int):
        self.evaluate_at = evaluate_at
        self.iterations: list[Counts] = []
        self.evaluation = Counts()
        self._before = Counts()

    def before_step(self) -> None:
        if self.trainer.iter > self.trainer.start_iter:
            self._cut()
        if self.trainer.iter == self.evaluate_at:
            self._evaluate()
        self._before = COUNTS.copy()

    def after_train(self) -> None:
        self._cut()

    def _cut(self) -> None:
        self.iterations.append(COUNTS.since(self._before))

    def _evaluate(self) -> None:
        model = self.trainer.segmentor.eval()
        # The second pass is counted, because the first may prepare things for the whole evaluation.
        for _ in range(2):
            with torch.no_grad(), counting() as self.evaluation:
                model([{"image": torch.zeros(3, SIDE, SIDE, dtype=torch.uint8)}])
        model.train()


def count_steps(
    config: str, method: str, options: Sequence[str] = (), *, iterations: int = 8
) -> StepCounts:
    """Trains for a few iterations on the fake device.

    Args:
        config: a config file.
        method: TUNING.METHOD.
        options: more keys of the config, each followed by its value.
        iterations: the number of iterations; the first two are warm-up.

    Returns:
        The counts of each iteration.
    """
    with tempfile.TemporaryDirectory() as folder:
        _write_data(Path(folder))
        keys = {
            **NARROW,
            "MODEL.DEVICE": "cuda",
            "MODEL.VFM.WEIGHTS": "random",
            "MODEL.VFM.IMG_SIZE": [SIDE, SIDE],
            "TUNING.METHOD": method,
            "TUNING.WARMUP_ITERS": WARMUP,
            "FISHER.BATCHES": 1,
            "FISHER.IMS_PER_BATCH": 2,
            "DATASETS.TRAIN": (DATASET,),
            "DATASETS.TEST": (),
            "DATALOADER.NUM_WORKERS": 0,
            "INPUT.MIN_SIZE_TRAIN": [SIDE],
            "INPUT.CROP.SIZE": [SIDE, SIDE],
            "SOLVER.MAX_ITER": iterations,
            "SOLVER.CHECKPOINT_PERIOD": 1000 * iterations,
            "OUTPUT_DIR": f"{folder}/run",
        }
        words = [str(word) for pair in keys.items() for word in pair]
        cfg = read_config(config, [*words, *options])
        Path(cfg.OUTPUT_DIR).mkdir()
        name, entry = cfg.MODEL.VFM.NAME, VFMS[cfg.MODEL.VFM.NAME]
        VFMS[name] = replace(entry, options={**entry.options, "embed_dim": 64, "num_heads": 2})
        try:
            trainer = Trainer(cfg)
            # With LayerScale's initial values, no weight of most tensors would be selected.
            for parameter in trainer.segmentor.backbone.parameters():
                parameter.data += 0.1 * torch.randn_like(parameter)
            watch = _Watch(evaluate_at=iterations - 1)
            trainer.register_hooks([watch])
            trainer._hooks.insert(0, trainer._hooks.pop())
            trainer.train()
        finally:
            VFMS[name] = entry
            DatasetCatalog.remove(DATASET)
            MetadataCatalog.remove(DATASET)
    return StepCounts(watch.iterations, WARMUP, watch.evaluation)


def _write_data(folder: Path) -> None:
    """Makes four images of squares of all classes."""
    rng = np.random.default_rng(0)
    for part in ("images", "labels"):
        (folder / part).mkdir()
    for i in range(4):
        label = rng.integers(0, CLASSES, (SIDE // 8, SIDE // 8), dtype=np.uint8)
        label = label.repeat(8, 0).repeat(8, 1)
        Image.fromarray(label).save(folder / f"labels/{i}.png")
        Image.fromarray(np.stack([12 * label] * 3, -1)).save(folder / f"images/{i}.png")
    names = [f"class {k}" for k in range(CLASSES)]
    register_sem_seg(DATASET, folder / "images", folder / "labels", names)


def print_table(entries: dict[str, Counts], details: bool) -> None:
    """Prints a line for each entry; with ``details``, also by operator and by place."""
    print(f"{'':<40}{'operators':>10}{'waits':>7}{'uploads':>9}")
    for title, counts in entries.items():
        numbers = (each.total() for each in vars(counts).values())
        print("{:<40}{:>10}{:>7}{:>9}".format(title, *numbers))
    for title, counts in entries.items() if details else ():
        print(f"\n{title}")
        operators = counts.by_name("operators")
        for name, number in operators.most_common(LINES):
            print(f"  {number:>6} {name}")
        for kind in ("waits", "uploads"):
            for (name, place), number in getattr(counts, kind).most_common(LINES):
                print(f"  {number:>6} {kind}: {name} at {place}")


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config")
    parser.add_argument("--methods", nargs="+", default=["full", "fishertune"])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument(
        "--details", action="store_true", help="also count by operator and by line of code"
    )
    parser.add_argument("--opts", nargs="+", default=[], help="keys of the config and their values")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    entries = {}
    for method in args.methods:
        found = count_steps(args.config, method, args.opts, iterations=args.iterations)
        by_waits = sorted(found.tuning, key=lambda each: each.waits.total())
        entries |= {
            f"{method}: a step of warm-up": found.iterations[WARMUP - 1],
            f"{method}: the first step of tuning": found.iterations[WARMUP],
            f"{method}: a step of tuning": by_waits[(len(by_waits) - 1) // 2],
            f"{method}: the worst step of tuning": by_waits[-1],
            f"{method}: evaluation of an image": found.evaluation,
        }
    print_table(entries, args.details)


if __name__ == "__main__":
    main()
