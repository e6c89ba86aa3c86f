"""FisherTune in one call, for a Detectron2 trainer and a model that are not ours."""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.optim import Optimizer

from fishertune_d2.fisher import (
    ESTIMATORS,
    FisherEstimate,
    Selection,
    StatisticsPerturbation,
    count_of_share,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
    tuned_share,
)
from fishertune_d2.tuning import MaskedUpdate

from .hooks import FisherEstimation, ParameterMask
from .output_dir import require_writable
from .vit import count_parameters_around, find_vit, parameters_of_vit

logger = logging.getLogger(__name__)


def apply_fishertune(
    trainer: TrainerBase,
    data_loader: Iterable[Sequence],
    *,
    max_iter: int,
    output_dir: str | Path,
    backbone: str | None = None,
    warmup: int = 0,
    d_min: float = 0.01,
    d_max: float = 0.05,
    schedule: str = "growing",
    batches: int = 500,
    loss_fn: Callable[[nn.Module, Sequence], Tensor] | None = None,
    estimator: str = "diagonal_loop",
    perturb: StatisticsPerturbation | None = None,
    seed: int = 0,
) -> FisherEstimation:
    """Lets a trainer move, of a ViT in its model, only the weights that FisherTune selects.

    Registers hooks and changes nothing else: model, optimizer, DDP wrapper and learning rates stay
    the trainer's. What is around the ViT trains as before: heads, a neck in the backbone, also a
    neck or decoder in the class that holds the blocks (:func:`~.vit.parameters_of_vit` says which).
    The ViT stands still for ``warmup`` iterations; then F(x) and F(x') are measured, once, and of
    its weights the selected move, ever more of them (Algorithm 1). All others keep their values to
    the bit, whatever momentum or weight decay the optimizer has. How many weights are which is
    logged.

    Call it before a checkpoint is loaded: checkpoints then remember the selection, and a resumed
    run goes on with it. Where there are several processes, call it in each.

    Args:
        trainer: a ``SimpleTrainer``, ``AMPTrainer``, ``DefaultTrainer`` or what derives from them.
            Its optimizer holds the candidates of the ViT, unfrozen.
        data_loader: what the Fisher information is measured on: batches of two images or more, each
            a list, as Detectron2's training loaders yield them. Not the trainer's own, which would
            lose its place. It is first read when the warm-up is over.
        max_iter: T1 + T3, the iteration where training ends.
        output_dir: where ``fisher.safetensors`` and ``selection.safetensors`` go; all processes
            must be able to read them there.
        backbone: name of the submodule that the ViT is, or is in; by default ``backbone``. The ViT
            is the module in it that holds the blocks, see :func:`~.vit.find_vit`.
        warmup: T1, in iterations. The backbone's gradients are computed and thrown away meanwhile:
            flags flipped under a live optimizer or DDP wrapper would harm them.
        d_min: share of the ViT that is tuned at first.
        d_max: share that is tuned in the end.
        schedule: how it grows, see :func:`~fishertune_d2.fisher.tuned_share`.
        batches: T2, how many are drawn from ``data_loader``, in each process.
        loss_fn: ``(model, batch) -> (B,)``, the loss of each image. By default
            :func:`loss_of_one_image`, which serves every model that Detectron2's trainers do.
        estimator: a key of ``fishertune_d2.fisher.ESTIMATORS``. ``"diagonal_loop"``, one pass for
            each image, serves every loss; ``"diagonal"`` gives the same numbers sooner where
            ``loss_fn`` gives those of a whole batch.
        perturb: Eq. 6; by default ``StatisticsPerturbation.of_vit``.
        seed: of the estimate's random numbers.

    Returns:
        The hook that estimates; its ``selection`` is there after the warm-up.

    Raises:
        OSError: if nothing can be written into ``output_dir``.
        ValueError: if an argument is out of its range, more weights than there are candidates
            would be selected, the model has no such backbone, one without
            a ViT, with several, or that is not trained, or the trainer has FisherTune already.
    """
    if not 0 <= warmup < max_iter:
        raise ValueError(f"warmup is {warmup}: choose 0 or more, and less than max_iter {max_iter}")
    if any(isinstance(hook, FisherEstimation) for hook in trainer._hooks):
        raise ValueError("the trainer has FisherTune already: apply it once")
    if batches < 1:
        raise ValueError(f"batches is {batches}: choose at least 1 to measure on")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator is {estimator!r}: choose from {', '.join(ESTIMATORS)}")
    model = getattr(trainer.model, "module", trainer.model)  # without its DDP wrapper
    path, vit = find_vit(model, backbone)
    candidates = find_candidates(vit)
    parameters = parameters_of_vit(vit)
    tunable = {candidate.name: candidate.parameter for candidate in candidates}
    _require_trained(tunable, trainer.optimizer)
    if perturb is None:
        perturb = StatisticsPerturbation.of_vit(vit)
    share = tuned_share(1.0, d_min, d_max, schedule=schedule)
    base = sum(parameter.numel() for parameter in parameters.values())
    most = sum(candidate.numel for candidate in candidates)
    if count_of_share(share, base) > most:
        raise ValueError(
            f"d_max {d_max} makes {count_of_share(share, base):,} of the ViT's {base:,} weights, "
            f"and only {most:,} can be selected: choose at most {int(1000 * most / base) / 1000}"
        )
    require_writable(output_dir)  # now, not after the warm-up

    def estimate() -> FisherEstimate:
        # Models write into the storage on top, and the run's metrics must not show these passes.
        with EventStorage(get_event_storage().iter):
            return estimate_fisher(
                model,
                islice(_with_spread(data_loader), batches),
                loss_fn or loss_of_one_image,
                candidates,
                estimator=estimator,
                perturb=perturb,
                seed=seed,
                progress=comm.is_main_process(),
            )

    estimation = FisherEstimation(
        estimate,
        domain_related_fisher,
        start=warmup,
        share=share,
        base=base,
        output_dir=output_dir,
    )
    optimizer = trainer.optimizer  # the hooks must not hold the trainer, which holds them

    def update() -> MaskedUpdate:
        if estimation.selection is None:
            raise RuntimeError(
                f"training goes on after iteration {warmup}, where weights are selected, and no "
                "checkpoint has told which: call apply_fishertune before one is loaded, and resume "
                "runs that had it from their beginning"
            )
        return MaskedUpdate(optimizer, tunable, estimation.selection)

    if comm.is_main_process():
        _log_parts(model, path, base, most)
    others = {name: p for name, p in parameters.items() if name not in tunable}
    mask = {"start": warmup, "iters": max_iter - warmup, "d_min": d_min, "d_max": d_max}
    trainer.register_hooks(
        [
            FrozenWeights(optimizer, others, until=max_iter),
            FrozenWeights(optimizer, tunable, until=warmup),
            estimation,
            ParameterMask(update, schedule=schedule, **mask),
        ]
    )
    return estimation


class FrozenWeights(HookBase):
    """Keeps parameters as they are up to an iteration, while an optimizer holds and steps them.

    Args:
        optimizer: any ``torch.optim.Optimizer``.
        parameters: by name.
        until: the first iteration that may move them.
    """

    def __init__(self, optimizer: Optimizer, parameters: Mapping[str, nn.Parameter], until: int):
        self.optimizer = optimizer
        self.parameters = parameters
        self.until = until
        self._update: MaskedUpdate | None = None

    def before_step(self) -> None:
        """Freezes them at the first step, for a checkpoint may be loaded before that."""
        if self.trainer.iter >= self.until:
            self.after_train()
        elif self._update is None:
            nothing = dict.fromkeys(self.parameters, torch.empty(0, dtype=torch.int64))
            shapes = {name: tuple(p.shape) for name, p in self.parameters.items()}
            selection = Selection(nothing, nothing, shapes, share=0.0, base=1)
            self._update = MaskedUpdate(self.optimizer, self.parameters, selection)

    def after_train(self) -> None:
        """Leaves the optimizer as it was."""
        if self._update is not None:
            self._update.release()
            self._update = None


def loss_of_one_image(model: nn.Module, batch: Sequence) -> Tensor:
    """What a Detectron2 model returns in training, summed: the loss of an image if given one.

    Of a batch, such a model gives one number for all images. So the Fisher information, squares of
    gradients of each image, needs the estimator ``diagonal_loop``, which gives it one at a time.
    All at once pass through the model only where Eq. 6 takes its statistics, without a gradient.

    Args:
        model: returns losses by name, or their sum.
        batch: B images.

    Returns:
        (B,), all equal.

    Raises:
        ValueError: if a gradient is asked for of more than one image.
    """
    if len(batch) > 1 and torch.is_grad_enabled():
        raise ValueError(
            f"loss_of_one_image has one number for {len(batch)} images: use the estimator "
            "'diagonal_loop', or a loss_fn that gives one for each image"
        )
    losses = model(batch)
    total = sum(losses.values()) if isinstance(losses, Mapping) else losses
    return total.reshape(1).expand(len(batch))


def _log_parts(model: nn.Module, path: str, base: int, tunable: int) -> None:
    """Says once what FisherTune does to each part of a model."""
    around = count_parameters_around(model, path)
    logger.info(
        "FisherTune on %s (%s): %s of its weights may be selected, %s stand still for the whole "
        "run (embeddings, norms, output projections). Left alone, to train as before: %s",
        path,
        type(model.get_submodule(path)).__name__,
        f"{tunable:,}",
        f"{base - tunable:,}",
        ", ".join(f"{count:,} of {name}" for name, count in around.items()) or "nothing",
    )


def _require_trained(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held or not parameter.requires_grad:
            raise ValueError(
                f"{name} of the backbone is frozen or not in the trainer's optimizer, so it could "
                "not move if it were selected: build both with the whole backbone trainable"
            )


def _with_spread(data_loader: Iterable[Sequence]) -> Iterator[Sequence]:
    """The batches, if Eq. 6 can take statistics over them."""
    for batch in data_loader:
        if len(batch) < 2:
            raise ValueError(
                "the data loader of apply_fishertune yields batches of one image, whose statistics "
                "have no spread, so that Eq. 6 shifts nothing: pass one with two or more"
            )
        yield batch
