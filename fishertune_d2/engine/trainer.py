"""Detectron2's DefaultTrainer with three stages: warm-up, estimation, tuning."""

import json
import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import islice
from math import ceil

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.modeling import build_model
from detectron2.projects.deeplab import build_lr_scheduler
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventWriter
from torch import nn
from torch.utils.data import DataLoader

from fishertune_d2.compat import wrap_for_ranks
from fishertune_d2.config import changed
from fishertune_d2.data import DatasetError
from fishertune_d2.evaluation import DomainGeneralizationEvaluator
from fishertune_d2.fisher import FisherEstimate, estimate_fisher, find_candidates
from fishertune_d2.tuning import build_tuning_method, require_same_shapes
from fishertune_d2.unread_keys import warn_of_unread_keys

from .checkpoint import WholeCheckpointer
from .evaluation_hook import Evaluation
from .hooks import LearningRates, WarmupFreeze
from .image_losses import SegmentationLoss
from .loaders import class_names, file_names, scoring_loader, training_loader, unlabelled_names
from .optimizer import build_optimizer, carry_state, is_backbone, set_iteration
from .output_dir import require_unused, require_writable
from .perturbation import build_shift, perturbation_of_training
from .precision import ESTIMATE_DTYPES, autocast_dtype, set_matmul_precision
from .preemption import Preemption
from .run_record import NOTE, RunRecord, fingerprint, remember_run
from .scoring import NotAllScored, metrics_by_name, score_datasets
from .self_training import build_self_training
from .sharing import OwnRun, check_estimate, load_warmup
from .stages import (
    build_average,
    build_estimation,
    build_mask,
    build_weight_decay,
    prepare_stage,
)
from .start_check import require_attachable, require_file, require_fillable, require_possible
from .step_trainer import StepTrainer
from .vit import require_nothing_around
from .writers import build_writers

logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Warms up the decoder, estimates the Fisher information, tunes the selected weights.

    Each stage builds its own trainable parameters, optimizer (the decoder's moments are carried
    over), schedule and DDP wrapper when it begins.

    The random numbers of a step depend on SEED, rank and iteration alone, and the data on SEED and
    position. So a resumed run goes on as if it had not stopped (on the CPU to the bit, on a GPU up
    to rounding), and methods that are compared see the same images and draw the same points.

    Attributes:
        stage: ``"warmup"`` or ``"tuning"``.
        method: the :class:`fishertune_d2.tuning.TuningMethod`.
    """

    def __init__(self, cfg: CfgNode):
        """Builds model, data and hooks; refuses a config that cannot work (``start_check``)."""
        warn_of_unread_keys(cfg)
        cfg = self.auto_scale_workers(cfg, comm.get_world_size())
        require_possible(cfg, comm.get_world_size())
        require_writable(cfg.OUTPUT_DIR)
        # DefaultTrainer's own would build one DDP wrapper for all stages, and fails on CPUs.
        TrainerBase.__init__(self)
        set_matmul_precision(cfg)
        self.cfg = cfg
        self.max_iter = cfg.SOLVER.MAX_ITER
        loader = self.build_train_loader(cfg)  # first: it finds missing data within a second
        seed_all_rng(cfg.SEED)
        model = self.build_model(cfg)
        require_nothing_around(model)
        self.method = build_tuning_method(cfg)
        require_attachable(cfg, self.method)
        dtype = autocast_dtype(cfg)
        self._trainer = StepTrainer(model, loader, dtype=dtype, parts=cfg.SOLVER.ACCUMULATE)
        require_fillable(cfg, self.method, self.backbone)
        start = fingerprint(self.backbone)
        files, others = file_names(loader), unlabelled_names(cfg, loader)
        record = RunRecord.of_run(cfg, files, class_names(cfg), start, others, model)
        self._run = OwnRun(record, cfg.OUTPUT_DIR)
        self._resumes = False
        self._average = build_average(cfg, lambda: self._selected)
        self.checkpointer = WholeCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            method=self.method,
            average=self._average,
            keep=cfg.SOLVER.KEEP_CHECKPOINTS,
            run=self._run,
            trainer=weakref.proxy(self),
        )
        self._preemption = Preemption(self._save_and_leave)
        estimate = self._preemption.at_once(self._estimate)
        self._estimation = build_estimation(cfg, self.method, self.backbone, estimate)
        self._perturbation = perturbation_of_training(cfg, self.backbone, comm.get_world_size())
        self.stage, self._attached = "", False
        self.start_stage("warmup")
        self.register_hooks(self.build_hooks())

    @property
    def segmentor(self) -> nn.Module:
        """The model without its DDP wrapper."""
        return getattr(self.model, "module", self.model)

    @property
    def backbone(self) -> nn.Module:
        """The segmentor's backbone."""
        return self.segmentor.get_submodule("backbone")

    def start_stage(self, stage: str) -> None:
        """Starts ``"warmup"`` or ``"tuning"``, unless it has begun already with all weights."""
        # A load attaches the weights that the method adds, if a checkpoint holds them.
        if (stage, getattr(self.backbone, "attached", False)) == (self.stage, self._attached):
            return
        model, old = self.segmentor, self._trainer.optimizer
        found = self._estimation
        selection = found.selection if found else None
        # Added weights start from SEED alone, so this run's warm-up and another's lead to the same.
        torch.manual_seed(self.cfg.SEED)
        tuned, self._selected = prepare_stage(model, stage, self.method, selection)
        self.optimizer = self.build_optimizer(self.cfg, model)
        if old is not None:
            carry_state(old, self.optimizer)
        self.scheduler = self.build_lr_scheduler(self.cfg, self.optimizer)
        set_iteration(self.scheduler, self.iter)
        self.model = wrap_for_ranks(model)
        self.stage, self._attached = stage, getattr(self.backbone, "attached", False)
        decoder = [p for name, p in model.named_parameters() if not is_backbone(name)]
        logger.info(
            "Stage %s: %s parameters of the decoder and %s of the backbone are in the optimizer",
            stage,
            f"{sum(p.numel() for p in decoder):,}",
            f"{sum(p.numel() for p in tuned):,}",
        )

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        """Builds the model; unlike Detectron2's, it does not log all of its modules."""
        return build_model(cfg)

    def build_writers(self) -> list[EventWriter]:
        """Detectron2's writers, with the stage on the console, and Weights & Biases if asked."""
        return build_writers(self.cfg, lambda: self.stage)

    def build_hooks(self) -> list[HookBase | None]:
        """The hooks of all stages, then Detectron2's for checkpoints, evaluation and writing."""
        cfg = self.cfg
        ret = [
            hooks.IterationTimer(),
            LearningRates(),
            *([self._estimation] if self._estimation else []),
            WarmupFreeze(cfg.TUNING.WARMUP_ITERS, on_end=lambda: self._save("model_warmup")),
            build_weight_decay(cfg),
            *([build_mask(cfg, self.method, lambda: self._selected)] if self._estimation else []),
            self._average,
            build_self_training(cfg, self._trainer.dtype),
        ]
        if comm.is_main_process():
            ret.append(hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD))
        ret.append(self._preemption)
        # After the checkpointer, so that the checkpoint is there if evaluation fails.
        test = cfg.TEST
        ret.append(Evaluation(test.EVAL_PERIOD, self._evaluate, self.checkpointer, test.BEST_ON))
        if comm.is_main_process():
            ret.append(hooks.PeriodicWriter(self.build_writers(), period=20))
        return ret

    def _estimate(self) -> FisherEstimate | None:
        """F(x) and F(x') of the backbone, measured or from FISHER.ESTIMATE."""
        fisher, backbone = self.cfg.FISHER, self.backbone
        if not self.method.estimates:
            return None
        if fisher.ESTIMATE:
            logger.info("Taking the Fisher information from %s", fisher.ESTIMATE)
            estimate = FisherEstimate.load(fisher.ESTIMATE).to(next(backbone.parameters()).device)
            require_same_shapes(self.method.parameters(backbone), estimate)
            return estimate
        logger.info("Estimating the Fisher information; no weight changes meanwhile")
        estimate = estimate_fisher(
            self.segmentor,
            self._estimation_batches(),
            SegmentationLoss(),
            find_candidates(backbone),
            estimator=fisher.ESTIMATOR,
            labels=fisher.LABELS,
            perturb=build_shift(self.cfg, backbone),
            seed=self.cfg.SEED,
            progress=comm.is_main_process(),
            autocast=ESTIMATE_DTYPES[fisher.PRECISION],
        )
        estimate.notes[NOTE] = json.dumps(self._run.record.state_dict())
        return estimate

    def _estimation_batches(self) -> Iterator[list[dict]]:
        """This process's share of T2 batches, in another order than training's."""
        # Batch k goes as a whole to process k modulo their number, because Eq. 6 takes its
        # statistics over a batch. So all processes together see the batches that one alone would.
        processes, fisher = comm.get_world_size(), self.cfg.FISHER
        options = ["SOLVER.IMS_PER_BATCH", fisher.IMS_PER_BATCH * processes]
        options += ["SELF_TRAINING.IMAGES", ""]
        # The method that training calls, so that a subclass estimates on its own data, too.
        loader = self.build_train_loader(changed(self.cfg, [*options, "SEED", self.cfg.SEED + 1]))
        return islice(loader, ceil(fisher.BATCHES / processes))

    def _save(self, name: str) -> None:
        self.checkpointer.save(name, iteration=self.iter)

    def _save_and_leave(self) -> None:
        self._trainer.write_losses()
        self._save("model_preempted")

    def resume_or_load(self, resume: bool = True) -> None:
        """Resumes this run, or starts from another run's warm-up, or from MODEL.WEIGHTS.

        Args:
            resume: go on with the run in OUTPUT_DIR, if it has a checkpoint.
        """
        self._resumes = resume
        warmup, fisher_estimate = self.cfg.TUNING.WARMUP_CHECKPOINT, self.cfg.FISHER.ESTIMATE
        if resume and self.checkpointer.has_checkpoint():
            super().resume_or_load(resume)
        elif warmup:
            load_warmup(
                warmup,
                model=self.segmentor,
                method=self.method,
                trainer=self,
                record=self._run.record,
                iters=self.cfg.TUNING.WARMUP_ITERS,
            )
            self.start_iter = self.iter + 1
        else:
            require_file("MODEL.WEIGHTS", self.cfg.MODEL.WEIGHTS)
            super().resume_or_load(resume)
            self.start_stage(self.stage)
            if self.cfg.MODEL.WEIGHTS:
                start = fingerprint(self.segmentor)
                self._run.record = replace(self._run.record, start=start)
        estimates = self.method.selects and self.method.estimates
        if fisher_estimate and estimates and self.start_iter <= self.cfg.TUNING.WARMUP_ITERS:
            check_estimate(fisher_estimate, self._run.record)

    def load_state_dict(self, state_dict: dict) -> None:
        """Restores a checkpoint's state, in the stage it was written in."""
        states = state_dict.get("hooks", {})
        if "BestCheckpoint" in states:  # the former name
            states["Evaluation"] = states.pop("BestCheckpoint")
        TrainerBase.load_state_dict(self, state_dict)  # iteration and hooks, so the selection too
        tuning = self.iter >= self.cfg.TUNING.WARMUP_ITERS
        self.start_stage("tuning" if tuning else "warmup")
        self._trainer.load_state_dict(state_dict["_trainer"])
        set_iteration(self.scheduler, self.iter + 1)  # the checkpoint's iteration is done

    def train(self) -> dict | None:
        """Trains from ``start_iter`` to the end; returns the test results if they are checked."""
        if comm.is_main_process() and not self._resumes:
            require_unused(self.cfg.OUTPUT_DIR)
        # The loader was built before a checkpoint set the first iteration.
        sampler = getattr(self.data_loader, "sampler", None)
        if hasattr(sampler, "start"):
            sampler.start = self.start_iter * self.cfg.SOLVER.IMS_PER_BATCH
        elif self.start_iter:
            logger.warning(
                "The loader of %s.build_train_loader cannot go on where training stopped, so from "
                "iteration %d the images come in another order than in a run without a stop",
                type(self).__name__,
                self.start_iter,
            )
        try:
            with self._preemption.listening():
                return super().train()
        finally:
            # This ends the loader's workers. PyTorch takes 5 seconds for each if the iterator is
            # left to the garbage collector, which stops the thread that would tell them to end.
            self._trainer._data_loader_iter_obj = None

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
        """Eq. 6 on this step's features, if TUNING.FEATURE_PERTURBATION asks for it."""
        if self._perturbation is None or self.stage != "tuning":
            return nullcontext()
        # A generator of its own, so that the loss draws the same points as without Eq. 6.
        return self._perturbation.drawing(torch.Generator().manual_seed(seed))

    @staticmethod
    def auto_scale_workers(cfg: CfgNode, num_workers: int) -> CfgNode:
        """Scales as Detectron2 does by SOLVER.REFERENCE_WORLD_SIZE; T1 keeps its part of T1+T3."""
        scaled = DefaultTrainer.auto_scale_workers(cfg, num_workers)
        if scaled is not cfg:  # a copy, which may be changed
            scale = num_workers / cfg.SOLVER.REFERENCE_WORLD_SIZE
            scaled.defrost()
            scaled.TUNING.WARMUP_ITERS = round(cfg.TUNING.WARMUP_ITERS / scale)
            scaled.SOLVER.EMA_START = round(cfg.SOLVER.EMA_START / scale)
            scaled.SELF_TRAINING.PERIOD = max(1, round(cfg.SELF_TRAINING.PERIOD / scale))
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
        return training_loader(cfg)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str) -> DataLoader:
        """The images of one test set, in order."""
        return scoring_loader(cfg, dataset_name)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        """The evaluator of one test set, whose pictures go to the folder, or to OUTPUT_DIR."""
        return DomainGeneralizationEvaluator(
            cfg, dataset_name, output_dir=output_folder or cfg.OUTPUT_DIR
        )

    @classmethod
    def test(
        cls,
        cfg: CfgNode,
        model: nn.Module,
        evaluators: DatasetEvaluator | Sequence[DatasetEvaluator] | None = None,
    ) -> dict:
        """Scores a model on every test set and writes the table; see ``scoring.score_datasets``."""
        return score_datasets(
            cfg,
            model,
            evaluators=evaluators,
            build_loader=cls.build_test_loader,
            build_evaluator=cls.build_evaluator,
        )

    def _evaluate(self) -> dict:
        done = min(self.iter + 1, self.max_iter)
        remember_run(self.segmentor, replace(self._run.record, iterations=done))
        # Not all of this method: a signal must not stop the exchange of weights and averages.
        test = self._preemption.at_once(lambda: self.test(self.cfg, self.segmentor))
        try:
            with self._average.applied():
                results = test()
        except DatasetError as error:
            if done == self.max_iter:
                raise
            logger.error("Training goes on after a test set could not be scored: %s", error)
            results = error.results if isinstance(error, NotAllScored) else {}
        # DefaultTrainer compares the attribute of this name with TEST.EXPECTED_RESULTS.
        self._last_eval_results = metrics_by_name(results)
        return results
