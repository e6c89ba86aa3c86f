"""The shortened demo that check.py and carry.py run; needs only Python's standard library."""

import json
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# A third of the demo: the six scores rise above 0, and a CPU trains it in minutes.
DEMO = {
    "SOLVER.MAX_ITER": 100,
    "SOLVER.CHECKPOINT_PERIOD": 1000,
    "TUNING.WARMUP_ITERS": 50,
    "FISHER.BATCHES": 4,
    "TEST.PICTURES": 0,
}
# The model and the head of a dry run train in seconds.
TOY = {
    "MODEL.VFM.NAME": "tiny",
    "MODEL.VFM.PATCH_SIZE": 16,
    "MODEL.VFM.IMG_SIZE": [64, 96],
    "INPUT.CROP.SIZE": [64, 96],
    "INPUT.MIN_SIZE_TRAIN": [64],
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
    "MODEL.MASK_FORMER.DEC_LAYERS": 2,
    "MODEL.MASK_FORMER.TRAIN_NUM_POINTS": 64,
    "SOLVER.MAX_ITER": 40,
    "TUNING.WARMUP_ITERS": 20,
    "TUNING.D_MIN": 0.05,
    "FISHER.BATCHES": 1,
}


def demo_command(device: str, weights: Path, output: Path, *flags: str) -> list[str]:
    """Returns the command that trains the shortened demo, without ``python``.

    Args:
        device: MODEL.DEVICE.
        weights: DINOv2 ViT-S/14.
        output: OUTPUT_DIR.
        flags: options such as ``--resume``; keys and values may follow the command.
    """
    keys = {**DEMO, "MODEL.DEVICE": device, "MODEL.VFM.WEIGHTS": weights, "OUTPUT_DIR": output}
    words = ["train_net.py", "--config-file", "configs/demo.yaml", *flags]
    return words + [str(word) for pair in keys.items() for word in pair]


def demo_scores(output: Path) -> dict:
    """Reads the results of a run.

    Args:
        output: its OUTPUT_DIR.

    Returns:
        ``mIoU`` by data set, in percent, and ``losses``: the total loss by iteration.
    """
    lines = map(json.loads, (output / "metrics.json").read_text().splitlines())
    losses = {str(line["iteration"]): line["total_loss"] for line in lines if "total_loss" in line}
    return {"mIoU": read_scores(output), "losses": losses}


def read_scores(output: Path) -> dict[str, float]:
    """Reads the mIoU in percent by data set from a run's OUTPUT_DIR."""
    results = json.loads((output / "results.json").read_text())
    return {**results["source"], **results["targets"]}


def commit() -> str | None:
    """Returns the checkout's commit, marked if files differ from it; None without git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None
