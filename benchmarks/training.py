#!/usr/bin/env python
"""Compares a training step of freeze, LoRA and FisherTune with one of full fine-tuning.

FisherTune selects single weights or neurons: 5 % of the backbone, and 20 %.

    python benchmarks/training.py                              # DINOv2-S as in configs/camvid
    python benchmarks/training.py --config-file configs/fishertune_dinov2.yaml MODEL.DEVICE cuda
    python benchmarks/training.py --show docs/results/training/cpu.json    # the tables again

The benchmark needs neither data nor weights: images are noise, labels are bands, and the time does
not depend on the values of the weights. The time of a step is the median over rounds. In each round
every method makes one step, in one process. A peak of memory is that of a process that runs one
method, minus that of a process that only imports. LoRA needs
``pip install fishertune-d2[baselines]``.
"""

import argparse
import io
import json
import platform
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import NamedTemporaryFile

import torch
from tabulate import tabulate
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from detectron2.config import CfgNode  # noqa: E402 - the package need not be installed

from fishertune_d2.config import read_config  # noqa: E402
from fishertune_d2.engine import Trainer  # noqa: E402
from fishertune_d2.engine.scoring import commit  # noqa: E402
from fishertune_d2.export.delta import Architecture, Delta  # noqa: E402
from fishertune_d2.fisher import Selection, Units, find_candidates  # noqa: E402
from fishertune_d2.tuning import MaskedUpdate, SelectedWeights, SelectiveMethod  # noqa: E402
from fishertune_d2.tuning.full import Full  # noqa: E402
from fishertune_d2.tuning.peft_tuners import lora  # noqa: E402
from fishertune_d2.tuning.random_choice import RandomChoice  # noqa: E402

PHASES = ("forward", "backward", "optimizer")
Tune = Callable[[CfgNode, nn.Module], Iterable[nn.Parameter]]


def _freeze(cfg: CfgNode, backbone: nn.Module) -> Iterable[nn.Parameter]:
    return []


def _full(cfg: CfgNode, backbone: nn.Module) -> Iterable[nn.Parameter]:
    return Full().parameters(backbone).values()


def _lora(cfg: CfgNode, backbone: nn.Module) -> Iterable[nn.Parameter]:
    method = lora(cfg)
    method.attach(backbone)
    return method.parameters(backbone).values()


def _selection(cfg: CfgNode, backbone: nn.Module, unit: str, share: float) -> Selection:
    """Selects units of the backbone at random; a step costs as much as with any selection."""
    base = sum(p.numel() for p in backbone.parameters())
    shapes = {c.name: tuple(c.parameter.shape) for c in find_candidates(backbone)}
    units = Units(unit, shapes)
    scores = RandomChoice(cfg.SEED).unit_scores(backbone, None, units)
    return Selection.from_scores(scores, share, base, units)


def fishertune(
    unit: str, share: float, cfg: CfgNode, backbone: nn.Module
) -> Iterable[nn.Parameter]:
    """Attaches a share of a backbone's units, chosen at random; returns their vectors."""
    selected = SelectedWeights(backbone, _selection(cfg, backbone, unit, share))
    selected.grow(share)
    return selected.parameters().values()


def _candidates(cfg: CfgNode, backbone: nn.Module) -> Iterable[nn.Parameter]:
    return SelectiveMethod().parameters(backbone).values()


DENSE = "fishertune, dense mask"
WAYS: dict[str, Tune] = {
    "freeze": _freeze,
    "full": _full,
    "lora": _lora,
    "fishertune, weights": partial(fishertune, "weight", 0.05),
    "fishertune, weights, 20 %": partial(fishertune, "weight", 0.2),
    "fishertune, neurons": partial(fishertune, "neuron", 0.05),
    "fishertune, neurons, 20 %": partial(fishertune, "neuron", 0.2),
    DENSE: _candidates,
}


class Training:
    """A model that one method trains, on one batch of noise.

    Args:
        cfg: the config; MODEL, INPUT.CROP.SIZE, SOLVER and TUNING are used.
        tune: attaches what is tuned to the backbone and returns it, as the values of :data:`WAYS`.
    """

    def __init__(self, cfg: CfgNode, tune: Tune):
        self.cfg = cfg
        torch.manual_seed(0)
        self.model = Trainer.build_model(cfg).train()
        self.backbone = self.model.backbone
        self.backbone.requires_grad_(False)
        self.tuned = list(tune(cfg, self.backbone))
        for parameter in self.tuned:
            parameter.requires_grad_(True)
        self.optimizer = Trainer.build_optimizer(cfg, self.model)
        if tune is WAYS[DENSE]:
            dense = SelectiveMethod().parameters(self.backbone)
            selection = _selection(cfg, self.backbone, "weight", 0.05)
            MaskedUpdate(self.optimizer, dense, selection).grow(0.05)
        height, width = cfg.INPUT.CROP.SIZE
        classes = cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
        bands = (torch.arange(height) * classes // height)[:, None].expand(height, width)
        self.batch = [
            {"image": torch.randint(0, 256, (3, height, width)).float(), "sem_seg": bands}
            for _ in range(cfg.SOLVER.IMS_PER_BATCH)
        ]

    def step(self) -> dict[str, float]:
        """Makes one training step, and returns the seconds of its phases."""
        seconds = {}
        self.optimizer.zero_grad(set_to_none=True)
        start = _now()
        loss = sum(self.model(self.batch).values())
        seconds["forward"], start = _now() - start, _now()
        loss.backward()
        seconds["backward"], start = _now() - start, _now()
        self.optimizer.step()
        seconds["optimizer"] = _now() - start
        return seconds

    def infer(self) -> float:
        """Times the backbone's forward pass as in evaluation, in seconds."""
        images = torch.stack([item["image"] for item in self.batch]).to(self.model.device)
        self.model.eval()
        start = _now()
        with torch.no_grad():
            self.backbone(images / 128 - 1)
        seconds = _now() - start
        self.model.train()
        return seconds

    def sizes(self) -> dict[str, int]:
        """Counts the bytes of the backbone's gradients and moments, and of a checkpoint."""
        states = [self.optimizer.state[p] for p in self.tuned]
        moments = [value for state in states for value in state.values() if value.dim() > 0]
        file = io.BytesIO()
        torch.save(
            {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, file
        )
        return {
            "trainable": sum(p.numel() for p in self.tuned),
            "gradient_bytes": _bytes(p.grad for p in self.tuned),
            "optimizer_bytes": _bytes(moments),
            "checkpoint_bytes": file.tell(),
            "delta_bytes": self._delta_bytes(),
        }

    def _delta_bytes(self) -> int:
        """Counts the bytes of the delta file, or of the added weights, after the steps so far."""
        torch.manual_seed(0)
        public = Trainer.build_model(self.cfg).backbone.state_dict()
        tuned = self.backbone.state_dict()
        if tuned.keys() != public.keys():
            return _bytes(self.tuned)
        architecture = Architecture("", "", (0, 0), 0, (0.0,) * 3, (0.0,) * 3)
        with NamedTemporaryFile(suffix=".safetensors") as file:
            Delta.between(public, tuned, architecture).save(file.name)
            return Path(file.name).stat().st_size


def measure(cfg: CfgNode, args: argparse.Namespace) -> dict:
    """Times all methods in turn, then measures the peak of each in a process of its own."""
    cells = {way: Training(cfg, WAYS[way]) for way in args.ways}
    seconds = {way: {phase: [] for phase in (*PHASES, "inference")} for way in cells}
    for number in range(args.rounds + 1):
        for way, cell in cells.items():
            phases = {**cell.step(), "inference": cell.infer()}
            if number > 0:  # the first round warms up
                for phase, value in phases.items():
                    seconds[way][phase].append(value)
        print(f"round {number} of {args.rounds}", file=sys.stderr, flush=True)
    measured = {}
    for way, cell in cells.items():
        times = seconds[way]
        steps = [sum(parts) for parts in zip(*(times[phase] for phase in PHASES), strict=True)]
        measured[way] = {
            "step_seconds": median(steps),
            **{f"{phase}_seconds": median(values) for phase, values in times.items()},
            **cell.sizes(),
        }
    cells.clear()
    nothing = _peak_of("nothing", args)
    for way in measured:
        measured[way]["peak_bytes"] = _peak_of(way, args) - nothing
    return {
        "vfm": cfg.MODEL.VFM.NAME,
        "crop": list(cfg.INPUT.CROP.SIZE),
        "batch": cfg.SOLVER.IMS_PER_BATCH,
        "rounds": args.rounds,
        "machine": _machine(cfg),
        "torch": torch.__version__,
        "commit": commit(),
        "backbone_bytes": sum(p.numel() for p in Trainer.build_model(cfg).backbone.parameters())
        * 4,
        "rows": measured,
    }


def _peak_of(way: str, args: argparse.Namespace) -> int:
    command = [sys.executable, __file__, "--config-file", args.config_file, "--peak", way]
    command += args.opts
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(text.split()[-1])


def peak(cfg: CfgNode, way: str) -> int:
    """Measures the peak memory of three steps in this process, in bytes."""
    if way != "nothing":
        training = Training(cfg, WAYS[way])
        for _ in range(3):
            training.step()
    if cfg.MODEL.DEVICE != "cpu":
        return torch.cuda.max_memory_allocated()
    # ru_maxrss would include the parent's peak.
    (line,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line) * 1024


def tables(result: dict) -> str:
    """Formats the numbers of full fine-tuning, and each method's ratios to them, as Markdown."""
    ways, full = result["rows"], result["rows"]["full"]
    head = (
        f"{result['vfm']}, crops of {result['crop'][0]} x {result['crop'][1]}, batch "
        f"{result['batch']}, on {result['machine']}; torch {result['torch']}, commit "
        f"{result['commit']}. Full fine-tuning takes {full['step_seconds']:.2f} s a step, "
        f"{_mb(full['peak_bytes'])} at the peak, {_mb(full['gradient_bytes'])} of backbone "
        f"gradients, {_mb(full['optimizer_bytes'])} of moments and a checkpoint of "
        f"{_mb(full['checkpoint_bytes'])}. The table shows each method as a ratio to full "
        "fine-tuning:"
    )

    def ratio(way: str, *keys: str) -> str:
        return f"{sum(ways[way][k] for k in keys) / sum(full[k] for k in keys):.3f}"

    columns = {
        "step": ("step_seconds",),
        "forward": ("forward_seconds",),
        "backward": ("backward_seconds",),
        "optimizer": ("optimizer_seconds",),
        "inference": ("inference_seconds",),
        "peak": ("peak_bytes",),
        "gradients, sent": ("gradient_bytes",),
        "gradients and moments": ("gradient_bytes", "optimizer_bytes"),
        "checkpoint": ("checkpoint_bytes",),
        "delta": ("delta_bytes",),
    }
    table = [
        [way, f"{ways[way]['trainable'] / 1e6:.2f} M", *(ratio(way, *k) for k in columns.values())]
        for way in ways
    ]
    body = tabulate(table, ["way", "tuned", *columns], tablefmt="github", disable_numparse=True)
    return f"{head}\n\n{body}"


def _mb(size: float) -> str:
    return f"{size / 1e6:,.0f} MB"


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _machine(cfg: CfgNode) -> str:
    if cfg.MODEL.DEVICE != "cpu":
        return f"one {torch.cuda.get_device_name()}"
    return f"{torch.get_num_threads()} threads of an {platform.machine()} CPU"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-file", default=str(ROOT / "configs/camvid/fishertune.yaml"))
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--output", type=Path, default=ROOT / "outputs/training/cost.json")
    parser.add_argument("--show", type=Path, help="prints the tables of a file, measures nothing")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs of the config")
    args = parser.parse_args()
    if args.show:
        print(tables(json.loads(args.show.read_text())))
        sys.exit()
    cfg = read_config(args.config_file, [*args.opts, "MODEL.VFM.WEIGHTS", "random"])
    if args.peak:
        print(peak(cfg, args.peak))
        sys.exit()
    result = measure(cfg, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(result, indent=1) + "\n")
    print(tables(result))
