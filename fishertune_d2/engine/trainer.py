"""Detectron2's DefaultTrainer with three stages: warm-up, estimation, tuning."""

import logging
import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from math import ceil

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from torch import nn
from torch.utils.data import DataLoader

from fishertune_d2.compat import wrap_for_ranks
from fishertune_d2.data import SegmentationMapper, build_train_loader, load_datasets
from fishertune_d2.fisher import (
    FisherEstimate,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
    tuned_share,
)
from fishertune_d2.tuning import build_tuning_method, require_same_shapes

from .checkpoint import RunRecord, WholeCheckpointer
from .hooks import FisherEstimation, LearningRates, ParameterMask, WarmupFreeze
from .image_losses import SegmentationLoss
from .optimizer import build_optimizer, carry_state, is_backbone
from .preemption import Preemption
from .scoring import score_datasets
from .stages import prepare_stage
from .step import StepTrainer, autocast_dtype, set_matmul_precision

logger = logging.getLogger(__name__)

# FISHER.PRECISION: what autocast computes the estimate's losses and gradients in. Never float16,
# in which squares of gradients underflow.
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# TUNING.FEATURE_PERTURBATION: how often a batch is perturbed. DSU's.
PERTURBED = 0.5


class Trainer(DefaultTrainer):
    """Warms up the decoder, estimates the Fisher information, tunes what it selects.

    What a stage trains is built when the stage begins: which parameters require a gradient, the
    optimizer (the decoder's moments are carried over), the schedule and the DDP wrapper.

    Every random number of a step is a function of SEED, rank and iteration, and the data of SEED
    and position, so that a resumed run goes on as if it had not stopped (on the CPU to the bit, on
    a GPU up to rounding), and methods that are compared see the same images and draw the same
    points.

    Attributes:
        stage: ``"warmup"`` or ``"tuning"``.
        method: the :class:`fishertune_d2.tuning.TuningMethod`.
    """

    def __init__(self, cfg: CfgNode):
        """Builds model, data and hooks; trains nothing yet.

        Raises:
            ValueError: if SEED is negative, warm-up would outlast training, FISHER.PRECISION or
                SOLVER.MATMUL_PRECISION is unknown, or TUNING.FEATURE_PERTURBATION is on and a
                process has one image a step.
        """
        if cfg.SEED < 0:
            raise ValueError(
                f"SEED is {cfg.SEED}: choose one of at least 0, on which the order of the data and "
                "every random number depend; a run without one could not be resumed"
            )
        if not 0 <= cfg.TUNING.WARMUP_ITERS <= cfg.SOLVER.MAX_ITER:
            raise ValueError(
                f"TUNING.WARMUP_ITERS is {cfg.TUNING.WARMUP_ITERS}: choose at least 0 and at most "
                f"SOLVER.MAX_ITER, {cfg.SOLVER.MAX_ITER}"
            )
        if cfg.FISHER.PRECISION not in PRECISIONS:
            raise ValueError(
                f"FISHER.PRECISION is {cfg.FISHER.PRECISION!r}: choose from {', '.join(PRECISIONS)}"
            )
        # Not DefaultTrainer's: it wraps with DDP once and for all, and fails to on CPUs.
        TrainerBase.__init__(self)
        set_matmul_precision(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        loader = self.build_train_loader(cfg)  # first, for it finds missing data within a second
        seed_all_rng(cfg.SEED)
        model = self.build_model(cfg)
        self.method = build_tuning_method(cfg)
        dtype = autocast_dtype(cfg)
        self._trainer = StepTrainer(model, loader, dtype=dtype, parts=cfg.SOLVER.ACCUMULATE)
        names = [item["file_name"] for item in loader.dataset.dicts]
        self.checkpointer = WholeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            method=self.method,
            run=RunRecord(cfg, names),
            trainer=weakref.proxy(self),
        )
        self._preemption = Preemption(self._save_and_leave)
        self._estimation = self._build_estimation()
        self._perturbation = self._build_perturbation()
        self.stage = ""
        self.start_stage("warmup")
        self.register_hooks(self.build_hooks())

    @property
    def segmentor(self) -> nn.Module:
        """The model without its DDP wrapper."""
        return getattr(self.model, "module", self.model)

    def start_stage(self, stage: str) -> None:
        """Builds what ``stage`` trains; a stage that has begun already is left alone.

        Raises:
            ValueError: if there is no such stage, or the method does not work on this backbone.
            RuntimeError: if the method selects weights and none are selected yet.
        """
        if stage == self.stage:
            return
        model, old = self.segmentor, self.optimizer
        selection = self._estimation.selection if self._estimation else None
        # What a method adds begins as SEED says, whether the warm-up was this run's or another's.
        torch.manual_seed(self.cfg.SEED)
        tuned, self._selected = prepare_stage(model, stage, self.method, selection)
        self.optimizer = self.build_optimizer(self.cfg, model)
        if old is not None:
            carry_state(old, self.optimizer)
        self.scheduler = self.build_lr_scheduler(self.cfg, self.optimizer)
        self._set_learning_rates(self.iter)
        self.model = wrap_for_ranks(model)
        self.stage = stage
        decoder = [p for name, p in model.named_parameters() if not is_backbone(name)]
        logger.info(
            "Stage %s: %s parameters of the decoder and %s of the backbone are in the optimizer",
            stage,
            f"{sum(p.numel() for p in decoder):,}",
            f"{sum(p.numel() for p in tuned):,}",
        )

    def build_hooks(self) -> list[HookBase | None]:
        """The hooks of all stages, then Detectron2's for checkpoints, evaluation and writing."""
        cfg = self.cfg
        ret = [
            hooks.IterationTimer(),
            LearningRates(),
            *([self._estimation] if self._estimation else []),
            WarmupFreeze(cfg.TUNING.WARMUP_ITERS, on_end=lambda: self._save("model_warmup")),
            *([self._build_mask()] if self._estimation else []),
        ]
        if comm.is_main_process():
            ret.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        ret.append(self._preemption)
        # After the checkpointer: should evaluation fail, the checkpoint is there.
        evaluate = self._preemption.at_once(lambda: self.test(cfg, self.segmentor))
        ret.append(hooks.EvalHook(cfg.TEST.EVAL_PERIOD, evaluate))
        if comm.is_main_process():
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return ret

    @property
    def _schedule(self) -> str:
        return self.method.schedule or self.cfg.TUNING.SCHEDULE

    def _build_estimation(self) -> FisherEstimation | None:
        cfg, backbone = self.cfg, self.segmentor.backbone
        if not self.method.selects:
            return None
        return FisherEstimation(
            self._preemption.at_once(self._estimate),
            lambda estimate: self.method.scores(backbone, estimate),
            start=cfg.TUNING.WARMUP_ITERS,
            share=tuned_share(1.0, cfg.TUNING.D_MIN, cfg.TUNING.D_MAX, form=self._schedule),
            base=sum(p.numel() for p in backbone.parameters()),
            output_dir=cfg.OUTPUT_DIR,
            eps=cfg.FISHER.EPS,
        )

    def _build_mask(self) -> ParameterMask:
        tuning = self.cfg.TUNING
        return ParameterMask(
            lambda: self._selected,
            start=tuning.WARMUP_ITERS,
            iters=self.max_iter - tuning.WARMUP_ITERS,
            d_min=tuning.D_MIN,
            d_max=tuning.D_MAX,
            schedule=self._schedule,
        )

    def _build_perturbation(self) -> StatisticsPerturbation | None:
        cfg, processes = self.cfg, comm.get_world_size()
        if not cfg.TUNING.FEATURE_PERTURBATION:
            return None
        images = cfg.SOLVER.IMS_PER_BATCH // processes // cfg.SOLVER.ACCUMULATE
        if images < 2:
            raise ValueError(
                "TUNING.FEATURE_PERTURBATION takes its statistics over what passes through the "
                f"model at once, but SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH} over "
                f"{processes} processes, in {cfg.SOLVER.ACCUMULATE} parts (SOLVER.ACCUMULATE), is "
                f"{images} images: choose a batch of at least {2 * processes}, in fewer parts"
            )
        if cfg.MODEL.VFM.CHECKPOINT_BLOCKS:
            raise ValueError(
                "TUNING.FEATURE_PERTURBATION draws other numbers when a block is computed again: "
                "set MODEL.VFM.CHECKPOINT_BLOCKS to False"
            )
        return build_perturbation(cfg, self.segmentor.backbone, p=PERTURBED)

    def _estimate(self) -> FisherEstimate | None:
        """F(x) and F(x') of the backbone, measured or from FISHER.ESTIMATE."""
        fisher, backbone = self.cfg.FISHER, self.segmentor.backbone
        if not self.method.estimates:
            return None
        if fisher.ESTIMATE:
            logger.info("Taking the Fisher information from %s", fisher.ESTIMATE)
            estimate = FisherEstimate.load(fisher.ESTIMATE).to(self.segmentor.device)
            require_same_shapes(self.method.parameters(backbone), estimate)
            return estimate
        logger.info("Estimating the Fisher information; no weight changes meanwhile")
        return estimate_fisher(
            self.segmentor,
            self._estimation_batches(),
            SegmentationLoss(),
            find_candidates(backbone),
            estimator=fisher.ESTIMATOR,
            labels=fisher.LABELS,
            perturb=build_perturbation(self.cfg, backbone),
            seed=self.cfg.SEED,
            progress=comm.is_main_process(),
            autocast=PRECISIONS[fisher.PRECISION],
        )

    def _estimation_batches(self) -> Iterator[list[dict]]:
        """This process's share of T2 batches, in another order than training sees.

        The k-th of all goes to process k modulo their number, whole, because Eq. 6 takes its
        statistics over a batch. So all processes together see what one alone would see.
        """
        processes = comm.get_world_size()
        images = self.cfg.FISHER.IMS_PER_BATCH * processes
        loader = _build_loader(self.cfg, images, self.cfg.SEED + 1)
        return islice(loader, ceil(self.cfg.FISHER.BATCHES / processes))

    def _save(self, name: str) -> None:
        self.checkpointer.save(name, iteration=self.iter)

    def _save_and_leave(self) -> None:
        self._trainer.write_losses()
        self._save("model_preempted")

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes this run, or starts from another run's warm-up, or from MODEL.WEIGHTS.

        Raises:
            ValueError: if the checkpoint is of another run, or TUNING.WARMUP_CHECKPOINT is not from
                the end of a warm-up of this length.
        """
        warmup = self.cfg.TUNING.WARMUP_CHECKPOINT
        if not warmup or (resume and self.checkpointer.has_checkpoint()):
            super().resume_or_load(resume)
            return
        self.checkpointer.load(warmup, checkpointables=["trainer"])  # of another run
        self.start_iter = self.iter + 1
        if self.start_iter != self.cfg.TUNING.WARMUP_ITERS:
            raise ValueError(
                f"TUNING.WARMUP_CHECKPOINT {warmup} was written after {self.start_iter} "
                f"iterations, but TUNING.WARMUP_ITERS is {self.cfg.TUNING.WARMUP_ITERS}: make "
                "them equal"
            )

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores a checkpoint's state, in the stage it was written in."""
        TrainerBase.load_state_dict(self, state_dict)  # iteration and hooks, so the selection too
        tuning = self.iter >= self.cfg.TUNING.WARMUP_ITERS
        self.start_stage("tuning" if tuning else "warmup")
        self._trainer.load_state_dict(state_dict["_trainer"])
        self._set_learning_rates(self.iter + 1)  # the checkpoint's iteration is done

    def _set_learning_rates(self, iteration: int) -> None:
        # Detectron2's schedules are functions of the iteration; a new one stands at 0.
        self.scheduler.last_epoch = iteration
        rates = self.scheduler.get_lr()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def train(self) -> dict | None:
        """Trains from ``start_iter`` to the end; returns the test results if they are checked."""
        # The loader was built before a checkpoint could tell how far training had come.
        self.data_loader.sampler.start = self.start_iter * self.cfg.SOLVER.IMS_PER_BATCH
        with self._preemption.listening():
            return super().train()

    def run_step(self) -> None:
        """One iteration, with random numbers that depend on SEED, rank and iteration alone.

        Raises:
            FloatingPointError: if a loss is not finite, before it moves a weight.
        """
        words = np.random.SeedSequence([self.cfg.SEED, comm.get_rank(), self.iter])
        seed, seed_of_shift = (int(word) for word in words.generate_state(2))
        torch.manual_seed(seed)
        try:
            with self._shift(seed_of_shift):
                super().run_step()
            if self.iter + 1 == self.max_iter:
                self._trainer.write_losses()
        except FloatingPointError as error:
            raise FloatingPointError(
                f"iteration {self.iter}, stage {self.stage}, {error} The last checkpoint stands"
            ) from error

    def _shift(self, seed: int) -> AbstractContextManager:
        """Eq. 6 on this step's features, if it is asked for in training."""
        if self._perturbation is None or self.stage != "tuning":
            return nullcontext()
        # Numbers of its own, so that the loss draws the same points as without.
        return self._perturbation.drawing(torch.Generator().manual_seed(seed))

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Detectron2's, for SOLVER.REFERENCE_WORLD_SIZE; T1 keeps its part of T1 + T3."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:  # a copy, then
            scale = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
            scaled.defrost()
            scaled.TUNING.WARMUP_ITERS = round(cfg.TUNING.WARMUP_ITERS / scale)
            if cfg.is_frozen():
                scaled.freeze()
        return scaled

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`fishertune_d2.engine.optimizer.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: CfgNode, optimizer: torch.optim.Optimizer):
        """Detectron2's schedules, the poly one of its DeepLab project included."""
        return build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> DataLoader:
        """The training data in the order that SEED gives."""
        return _build_loader(cfg, cfg.SOLVER.IMS_PER_BATCH, cfg.SEED)

    @classmethod
    def test(cls, cfg: CfgNode, model: nn.Module) -> dict:
        """Scores a model on every test set, and writes the table; see ``engine.scoring``."""
        return score_datasets(cfg, model)


def build_perturbation(cfg: CfgNode, backbone: nn.Module, p: float = 1.0) -> StatisticsPerturbation:
    """Eq. 6 at FISHER.PERTURB.POINTS of the backbone, on a batch with probability ``p``."""
    perturb, points = cfg.FISHER.PERTURB, backbone.perturbation_points()
    return StatisticsPerturbation(
        [points[i] for i in perturb.POINTS],
        num_prefix_tokens=backbone.num_prefix_tokens,
        strength=perturb.STRENGTH,
        eps_mode=perturb.EPS_MODE,
        p=p,
    )


def _build_loader(cfg: CfgNode, batch_size: int, seed: int) -> DataLoader:
    return build_train_loader(
        load_datasets(cfg.DATASETS.TRAIN),
        SegmentationMapper(cfg, is_train=True),
        batch_size=batch_size,
        num_workers=cfg.DATALOADER.NUM_WORKERS,
        seed=seed,
        pin_memory=torch.device(cfg.MODEL.DEVICE).type == "cuda",
    )
