"""The plan of a config: parameters, FLOPs, memory and files."""

from collections import Counter
from dataclasses import dataclass

from detectron2.config import CfgNode

from fishertune_d2.engine.checkpoint import PERIODIC
from fishertune_d2.engine.evaluation_hook import BEST
from fishertune_d2.engine.parameter_counts import count_parameters, count_tuned
from fishertune_d2.engine.start_check import require_possible
from fishertune_d2.engine.trainer import Trainer
from fishertune_d2.fisher import KINDS, Cost, find_candidates
from fishertune_d2.modeling.segmentor import VFMSegmentor
from fishertune_d2.tuning import build_tuning_method

from .fake_model import fake_model
from .fake_run import FakeRun
from .inference import Inference, plan_inference
from .memory import estimator_bytes, held_bytes
from .stage_costs import Stage, plan_stages


@dataclass(frozen=True)
class Plan:
    """The costs of a config.

    Attributes:
        method: TUNING.METHOD.
        vfm: MODEL.VFM.NAME.
        device: MODEL.DEVICE.
        size: (height, width) of a training image, in pixels.
        parameters: how many, by group.
        stages: the stages that a run goes through.
        inference: one for each size of test images.
        evaluations: how often a run scores all its test sets.
        files: bytes on the disk after the run, by file name or pattern, without headers.
        kept: how many periodic checkpoints these are.
    """

    method: str
    vfm: str
    device: str
    size: tuple[int, int]
    parameters: dict[str, int]
    stages: list[Stage]
    inference: list[Inference]
    evaluations: int
    files: dict[str, int]
    kept: int

    @property
    def uncounted(self) -> Counter[str]:
        """Operators that the FLOPs leave out though they may matter, and how often in a pass."""
        found: Counter[str] = Counter()
        for stage in self.stages:
            found |= stage.uncounted
        for tested in self.inference:
            found |= tested.flops.uncounted
        return found


def make_plan(cfg: CfgNode) -> Plan:
    """Plans a config without weights, without data, and without the device that it names.

    Args:
        cfg: the config, which is scaled to one process by SOLVER.REFERENCE_WORLD_SIZE, as in
            training. Detectron2 and the model raise their own errors if they cannot use it.

    Returns:
        The plan.

    Raises:
        ValueError: if nothing is trained, or the method computes with operators that need values.
    """
    cfg = Trainer.auto_scale_workers(cfg, 1)
    require_possible(cfg)
    size = tuple(cfg.INPUT.CROP.SIZE if cfg.INPUT.CROP.ENABLED else cfg.MODEL.VFM.IMG_SIZE)
    method = build_tuning_method(cfg)
    run = FakeRun(cfg, method, size)
    if not run.stages:
        raise ValueError(
            f"SOLVER.MAX_ITER is {cfg.SOLVER.MAX_ITER}: nothing is trained after the "
            f"{cfg.TUNING.WARMUP_ITERS} iterations of TUNING.WARMUP_ITERS"
        )
    try:
        stages = plan_stages(run)
    except NotImplementedError as error:  # PyTorch's, for an operator that the meta device lacks
        name, words = getattr(method, "name", cfg.TUNING.METHOD), str(error).partition(" with ")[0]
        raise ValueError(
            f"the cost of {name} cannot be counted without values ({words}): start a run, which "
            "logs how many weights it trains, and read its time and memory from metrics.json"
        ) from error
    trained = run.model(stages[-1].name)
    kept = _kept_checkpoints(cfg)
    return Plan(
        method=cfg.TUNING.METHOD,
        vfm=cfg.MODEL.VFM.NAME,
        device=cfg.MODEL.DEVICE,
        size=size,
        parameters=_parameters(cfg, fake_model(cfg)),
        stages=stages,
        inference=plan_inference(cfg, trained, unknown=size),
        evaluations=len(_periods(cfg, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.MAX_ITER - 1)) + 1,
        files=_files(cfg, run, stages, trained, kept),
        kept=len(kept),
    )


def _parameters(cfg: CfgNode, model: VFMSegmentor) -> dict[str, int]:
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


def _periods(cfg: CfgNode, period: int, last: int) -> list[int]:
    """The multiples of a period among the iterations of a run, counted from 1; none for 0."""
    first = cfg.TUNING.WARMUP_ITERS if cfg.TUNING.WARMUP_CHECKPOINT else 0
    return [i for i in range(first + 1, last + 1) if period > 0 and i % period == 0]


def _kept_checkpoints(cfg: CfgNode) -> list[str]:
    """The stage of each periodic checkpoint that stays."""
    written = _periods(cfg, cfg.SOLVER.CHECKPOINT_PERIOD, cfg.SOLVER.MAX_ITER)
    stages = ["warmup" if i <= cfg.TUNING.WARMUP_ITERS else "tuning" for i in written]
    return stages[-cfg.SOLVER.KEEP_CHECKPOINTS :]  # all, for 0


def _files(
    cfg: CfgNode, run: FakeRun, stages: list[Stage], trained: VFMSegmentor, kept: list[str]
) -> dict[str, int]:
    """Bytes of the files in OUTPUT_DIR; ``trained`` is the model with all weights of its method."""
    memory, files = {stage.name: stage.memory for stage in stages}, {}
    if "warmup" in memory:  # a checkpoint includes the optimizer's state
        weights = held_bytes(run.model("warmup").state_dict())
        files["model_warmup.pth"] = weights + memory["warmup"].optimizer
    if "tuning" in memory and run.method.selects:
        if run.method.estimates:  # FISHER.ESTIMATE is copied
            sums = estimator_bytes(Cost(), find_candidates(trained.backbone))
            files["fisher.safetensors"] = sums
        selection = run.selection(trained)
        parts = (selection.indices, selection.ranks, selection.steps or {})
        files["selection.safetensors"] = held_bytes(parts)
    last = stages[-1].memory
    weights = held_bytes(trained.state_dict()) + last.averages
    files["model_final.pth"] = weights + last.optimizer
    if cfg.TEST.BEST_ON:
        files[f"{BEST}.pth"] = files["model_final.pth"]
    sizes = {"warmup": files.get("model_warmup.pth", 0), "tuning": files["model_final.pth"]}
    if kept:
        files[PERIODIC] = sum(sizes[stage] for stage in kept)
    return files
