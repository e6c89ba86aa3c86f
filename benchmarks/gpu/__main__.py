"""Measures the cost of a run on one GPU: steps, memory, waits, launches, evaluation, F and plan.

    python benchmarks/gpu training          # needs a GPU; 2 minutes
    python benchmarks/gpu evaluation        # needs a GPU; 1 minute
    python benchmarks/gpu fisher            # needs a GPU; 1 minute
    python benchmarks/gpu ranking           # needs a GPU; 1 minute
    python benchmarks/gpu agreement         # needs a GPU; 1 minute
    python benchmarks/gpu plan              # 2 minutes on one core

DINOv2 ViT-L as in configs/fishertune_dinov2.yaml, at 512 x 512 in batches of 4, with random
weights, on images of noise of Cityscapes' size. An iteration of the trainer is timed by CUDA's
events, from the end of the iteration before to its own end, with loading and hooks. The first
iterations warm up; the figure is the median of the others. The last two iterations are not timed:
in one, the profiler counts kernels; in the other, CUDA warns of every wait for the device. A peak
is the most memory that torch's allocator gave out.

Each measurement is written to --output at once, so that an interrupted run keeps its figures. The
figures of other parts in that file stay. To try everything out on a CPU, add --device cpu --tiny.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

# This folder is a package, and fishertune_d2 need not be installed.
sys.path[:1] = [str(folder) for folder in Path(__file__).resolve().parents[1:3]]

from fishertune_d2.engine import Trainer  # noqa: E402
from fishertune_d2.engine.scoring import score_datasets  # noqa: E402
from gpu.fisher import agreement, fisher, ranking  # noqa: E402
from gpu.measure import (  # noqa: E402
    PRECISIONS,
    ROOT,
    check,
    configure,
    now,
    peak_gib,
    release,
    reset_peak,
    write_noise,
)
from gpu.training import plan, training  # noqa: E402

WINDOWS = (1, 6)  # in one forward pass; an image has 18
IMAGES = 4  # the first one warms up


def evaluation(args: argparse.Namespace, root: Path, save: Callable[..., None]) -> None:
    """Evaluates an image of 2048 x 1024 in windows of 512, from its file to the counted pixels."""
    entries: list[dict] = []
    cuda = args.device != "cpu"
    for precision in args.precisions:
        keys = PRECISIONS[precision]
        for windows in WINDOWS:
            options = {**keys, "TEST.WINDOWS_PER_BATCH": windows}
            cfg = configure(args, root / "run", options)
            (root / "run").mkdir(exist_ok=True)
            with torch.device(args.device):
                model = Trainer.build_model(cfg)
            model.untrained = frozenset()  # the time does not depend on the weights
            starts: list[float] = []
            inside: list[float] = []
            model.register_forward_pre_hook(lambda *_, s=starts: s.append(now(cuda)))
            model.register_forward_hook(lambda *_, s=starts, i=inside: i.append(now(cuda) - s[-1]))
            reset_peak(cuda)
            score_datasets(cfg, model)
            images = [1e3 * (b - a) for a, b in zip(starts[1:], starts[2:], strict=False)]
            entry = {"precision": precision, "windows": windows, "image_ms": median(images)}
            entry |= {"model_ms": 1e3 * median(inside[1:]), "peak_gib": peak_gib(cuda)}
            entries.append(entry)
            model = None
            release()
            save({"evaluation": entries}, [check(True, "evaluation", f"{len(entries)} ways")])
            print(entry, flush=True)


PARTS: dict[str, Callable[..., None]] = {
    each.__name__: each for each in (training, evaluation, fisher, ranking, agreement, plan)
}


def main() -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a tiny model and tiny images")
    parser.add_argument("--steps", type=int, default=19, help="iterations of each training")
    parser.add_argument("--precisions", nargs="+", default=list(PRECISIONS), choices=PRECISIONS)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/gpu/figures.json")
    args = parser.parse_args()
    before = json.loads(args.output.read_text()) if args.output.is_file() else {}
    args.output.parent.mkdir(parents=True, exist_ok=True)

    def save(figures: dict, checks: list[dict]) -> None:
        merged = {**before, **figures, "checks": {**before.get("checks", {}), args.part: checks}}
        growing = args.output.with_suffix(".growing")
        growing.write_text(json.dumps(merged, indent=1) + "\n")
        growing.replace(args.output)  # so that a reader always finds a whole file

    with tempfile.TemporaryDirectory() as folder:
        if args.part in ("training", "evaluation"):
            count, size = (IMAGES, (96, 192)) if args.tiny else (IMAGES, (1024, 2048))
            write_noise(Path(folder), size, count)
        PARTS[args.part](args, Path(folder), save)


if __name__ == "__main__":
    main()
