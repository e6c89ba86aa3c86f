"""The plan of a config: parameters, FLOPs, memory and files."""

from collections import Counter
from dataclasses import dataclass

from detectron2.config import CfgNode
from torch import nn

from fishertune_d2.engine.parameter_counts import count_parameters, count_tuned
from fishertune_d2.engine.stages import attach
from fishertune_d2.engine.start_check import require_possible
from fishertune_d2.fisher import KINDS, Cost, find_candidates
from fishertune_d2.tuning import TuningMethod, build_tuning_method

from .imagined import imagine
from .inference import Inference, plan_inference
from .memory import estimator_bytes, held_bytes
from .stages import Stage, plan_stages


@dataclass(frozen=True)
class Plan:
    """What a config costs.

    Attributes:
        method: TUNING.METHOD.
        vfm: MODEL.VFM.NAME.
        device: MODEL.DEVICE.
        size: (height, width) of a training image, in pixels.
        parameters: how many, by group.
        stages: those that a run goes through.
        inference: one for each size of test images.
        files: bytes by file name, without headers.
    """

    method: str
    vfm: str
    device: str
    size: tuple[int, int]
    parameters: dict[str, int]
    stages: list[Stage]
    inference: list[Inference]
    files: dict[str, int]

    @property
    def uncounted(self) -> Counter:
        """Operators that the FLOPs leave out though they may matter, and how often in a pass."""
        found = Counter()
        for each in [*self.stages, *(test.flops for test in self.inference)]:
            found |= each.uncounted
        return found


def make_plan(cfg: CfgNode) -> Plan:
    """Plans a config, without weights or data, and without the device it names.

    Raises:
        ValueError: if one of FISHER.ESTIMATOR, LABELS and PRECISION is unknown, nothing is trained,
            or the method computes with operators that need values. What Detectron2 and the model
            find wrong in a config, they raise.
    """
    require_possible(cfg)
    size = tuple(cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else cfg.MODEL.VFM.IMG_SIZE)
    model, method = imagine(cfg), build_tuning_method(cfg)
    try:
        stages = plan_stages(cfg, method, size)
    except NotImplementedError as error:  # of torch, for an operator that the meta device lacks
        name, words = getattr(method, "name", cfg.TUNING.METHOD), str(error).partition(" with ")[0]
        raise ValueError(
            f"the cost of {name} cannot be counted without values ({words}): start a run, which "
            "logs how many weights it trains, and read its time and memory from metrics.json"
        ) from error
    if not stages:
        raise ValueError(
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: nothing is trained after the "
            f"{cfg.TUNING.WARMUP_ITERS} iterations of TUNING.WARMUP_ITERS"
        )
    parameters, warmed_up = _parameters(cfg, model), held_bytes(model.state_dict())
    if stages[-1].name == "tuning":
        attach(model, method)
    return Plan(
        method=cfg.TUNING.METHOD,
        vfm=cfg.MODEL.VFM.NAME,
        device=cfg.MODEL.DEVICE,
        size=size,
        parameters=parameters,
        stages=stages,
        inference=plan_inference(cfg, model, unknown=size),
        files=_files(cfg, model, method, stages, warmed_up),
    )


def _parameters(cfg: CfgNode, model: nn.Module) -> dict[str, int]:
    backbone = model.backbone
    total = sum(p.numel() for p in model.parameters())
    counts = count_parameters(cfg, backbone)
    candidates = {"candidates": 0, **{f"candidates, {kind}": 0 for kind in KINDS}}
    for candidate in find_candidates(backbone):
        candidates["candidates"] += candidate.numel
        candidates[f"candidates, {candidate.kind}"] += candidate.numel
    return {
        "model": total,
        "decoder": total - counts["backbone_parameters"],
        "backbone": counts["backbone_parameters"],
        **candidates,
        "tuned at the start": count_tuned(cfg, backbone, progress=0.0),
        "tuned at the end": counts["tuned_parameters"],
    }


def _files(
    cfg: CfgNode, model: nn.Module, method: TuningMethod, stages: list[Stage], warmed_up: int
) -> dict[str, int]:
    """What the stages leave in OUTPUT_DIR; a checkpoint holds the optimizer's state, too.

    Args:
        cfg: the config.
        model: its model as it ends.
        method: its tuning method.
        stages: of the run.
        warmed_up: bytes of the weights that the warm-up leaves.
    """
    held, files = {stage.name: stage.memory for stage in stages}, {}
    if "warmup" in held:
        files["model_warmup.pth"] = warmed_up + held["warmup"].optimizer
    if "estimation" in held:
        files["fisher.safetensors"] = estimator_bytes(Cost(), find_candidates(model.backbone))
    if "tuning" in held and method.selects:
        # An index and a rank, of 8 bytes each.
        files["selection.safetensors"] = 16 * count_tuned(cfg, model.backbone, progress=1.0)
    files["model_final.pth"] = held_bytes(model.state_dict()) + stages[-1].memory.optimizer
    return files
