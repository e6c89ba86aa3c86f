"""FisherTune in one call, for Detectron2 trainers and models that are not ours.

:func:`apply_fishertune` registers hooks and changes nothing else: model, optimizer, DDP wrapper and
learning rates stay the trainer's. Parts around the ViT train as before: heads, a neck in the
backbone, and a neck or decoder in the class that holds the blocks
(:func:`~.vit.parameters_of_vit`). All weights of the ViT that are not selected keep their values to
the bit, whatever momentum or weight decay the optimizer has. During the warm-up the gradients of
the ViT are computed and discarded, because flags flipped under a live optimizer or DDP wrapper
would harm them. So the trainer's optimizer must hold the ViT's candidates, unfrozen.

The data loader is first read after the warm-up. It must not be the trainer's own, which would lose
its place. The default estimator, ``"diagonal_loop"``, makes one pass for each image and works with
every loss; ``"diagonal"`` gives the same numbers faster if ``loss_fn`` gives the losses of a whole
batch. All processes must be able to read ``output_dir``.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path

import torch
from detectron2.engine import HookBase
from detectron2.engine.train_loop import TrainerBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import Tensor, nn
from torch.optim import Optimizer

from fishertune_d2.config import require_choice
from fishertune_d2.fisher import (
    ESTIMATORS,
    FisherEstimate,
    Perturbation,
    Selection,
    StatisticsPerturbation,
    Units,
    count_of_share,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
    tuned_share,
)
from fishertune_d2.fisher.perturb import with_spread
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
    unit: str = "weight",
    allocation: str = "global",
    steps: str = "equal",
    batches: int = 500,
    loss_fn: Callable[[nn.Module, Sequence], Tensor] | None = None,
    estimator: str = "diagonal_loop",
    perturb: Perturbation | None = None,
    seed: int = 0,
) -> FisherEstimation:
    """Restricts a trainer to the weights of a ViT that FisherTune selects (Algorithm 1).

    Call it in each process, before a checkpoint is loaded: checkpoints then hold the selection.

    Args:
        trainer: a ``SimpleTrainer``, ``AMPTrainer``, ``DefaultTrainer`` or a subclass.
        data_loader: not the trainer's; gives lists of two or more images, or one image at its end.
        max_iter: T1 + T3, the iteration where training ends.
        output_dir: folder of ``fisher.safetensors`` and ``selection.safetensors``.
        backbone: name of the submodule that is or holds the ViT; by default ``backbone``.
        warmup: T1, the iterations before F(x) and F(x') are measured.
        d_min: share of the ViT that is tuned at first.
        d_max: share that is tuned in the end.
        schedule: growth between them, see :func:`~fishertune_d2.fisher.tuned_share`.
        unit: ``"weight"``, or ``"neuron"`` to select whole rows of Q, K and V and hidden neurons.
        allocation: ``"global"``, or ``"layer"`` for the same share of each kind in each block.
        steps: ``"equal"``, or ``"fisher"`` for smaller steps of more sensitive units.
        batches: T2, the number of batches from ``data_loader`` in each process.
        loss_fn: ``(model, batch) -> (B,)``; by default :func:`loss_of_one_image`.
        estimator: a key of ``ESTIMATORS``; ``"diagonal"`` is faster if ``loss_fn`` takes batches.
        perturb: Eq. 6; by default ``StatisticsPerturbation.of_vit``.
        seed: seed of the estimate's random numbers.

    Returns:
        The hook that estimates; it has its ``selection`` after the warm-up.

    Raises:
        ValueError: if an argument is out of its range, or fits neither trainer nor model.
    """
    if not 0 <= warmup < max_iter:
        raise ValueError(f"warmup is {warmup}: choose 0 or more, and less than max_iter {max_iter}")
    vit = _ViT(trainer, backbone, unit)
    estimate = vit.estimating(data_loader, batches, loss_fn, estimator, perturb, seed)
    estimation = FisherEstimation(
        estimate, vit.scores, start=warmup, share=vit.share(d_min, d_max, schedule), base=vit.base,
        output_dir=output_dir, units=vit.units, allocation=allocation, steps=steps,
    )  # fmt: skip
    require_writable(output_dir)  # now, not after the warm-up
    trainer.register_hooks(vit.hooks(estimation, max_iter, d_min, d_max, schedule))
    return estimation


class _ViT:
    """The ViT in a trainer's model, and the hooks that restrict its training.

    Attributes:
        parameters: the ViT's own weights, by name.
        tunable: the weights that hold candidates, by name.
        units: the units that may be selected.
        base: the number of the ViT's own weights.
        most: the number of weights that may be selected.
    """

    def __init__(self, trainer: TrainerBase, backbone: str | None, unit: str):
        if any(isinstance(hook, FisherEstimation) for hook in trainer._hooks):
            raise ValueError("the trainer has FisherTune already: apply it once")
        self.optimizer = trainer.optimizer  # the hooks must not hold the trainer, which holds them
        self.model = getattr(trainer.model, "module", trainer.model)  # without its DDP wrapper
        self.path, self.module = find_vit(self.model, backbone)
        self.candidates = find_candidates(self.module)
        self.parameters = parameters_of_vit(self.module)
        self.tunable = {candidate.name: candidate.parameter for candidate in self.candidates}
        self.base = sum(parameter.numel() for parameter in self.parameters.values())
        self.units = Units(unit, {name: tuple(p.shape) for name, p in self.tunable.items()})
        self.most = sum(group.count * group.size for group in self.units.groups.values())
        _require_trained(self.tunable, self.optimizer)

    def share(self, d_min: float, d_max: float, schedule: str) -> float:
        """The largest share that is tuned; refuses one that the candidates cannot fill."""
        share = tuned_share(1.0, d_min, d_max, schedule=schedule)
        count, most = count_of_share(share, self.base), self.most
        if count > most:
            raise ValueError(
                f"d_max {d_max} makes {count:,} of the ViT's {self.base:,} weights, and only "
                f"{most:,} can be selected: choose at most {int(1000 * most / self.base) / 1000}"
            )
        return share

    def estimating(
        self,
        data_loader: Iterable[Sequence],
        batches: int,
        loss_fn: Callable[[nn.Module, Sequence], Tensor] | None,
        estimator: str,
        perturb: Perturbation | None,
        seed: int,
    ) -> Callable[[], FisherEstimate]:
        """The function that measures F(x) and F(x') on the first batches of a loader."""
        if batches < 1:
            raise ValueError(f"batches is {batches}: choose at least 1 to measure on")
        require_choice("estimator", estimator, ESTIMATORS)
        if loss_fn is None and ESTIMATORS[estimator].cost.images != 1:  # now, not after the warm-up
            raise ValueError(
                f"the estimator {estimator!r} passes whole batches, of which a Detectron2 model "
                "gives one loss: pass a loss_fn that gives the loss of each image, or choose "
                "'diagonal_loop'"
            )
        shift = StatisticsPerturbation.of_vit(self.module) if perturb is None else perturb

        def estimate() -> FisherEstimate:
            # Models write into the storage on top; the run's metrics must not show these passes.
            with EventStorage(get_event_storage().iter):
                return estimate_fisher(
                    self.model,
                    # Made here, so that a DataLoader's workers end with the estimate.
                    islice(with_spread(data_loader, shift), batches),
                    loss_fn or loss_of_one_image,
                    self.candidates,
                    estimator=estimator,
                    perturb=shift,
                    seed=seed,
                    progress=comm.is_main_process(),
                )

        return estimate

    def scores(self, estimate: FisherEstimate | None) -> Mapping[str, Tensor]:
        """DRF of each unit."""
        assert estimate is not None  # `estimating` measures one
        return domain_related_fisher(estimate.by_unit(self.units))

    def hooks(
        self, estimation: FisherEstimation, max_iter: int, d_min: float, d_max: float, schedule: str
    ) -> list[HookBase]:
        """The hooks that freeze, estimate, and let selected weights move; logs what they do."""
        self.log()
        mask = ParameterMask(
            partial(self.restriction, estimation),
            start=estimation.start,
            iters=max_iter - estimation.start,
            d_min=d_min,
            d_max=d_max,
            schedule=schedule,
        )
        return [*self.frozen(estimation.start, max_iter), estimation, mask]

    def restriction(self, estimation: FisherEstimation) -> MaskedUpdate:
        """Restricts the optimizer to the weights that the estimation has selected."""
        if estimation.selection is None:
            raise RuntimeError(
                f"training starts after iteration {estimation.start}, where weights are selected, "
                "and no checkpoint holds a selection: call apply_fishertune before a checkpoint is "
                "loaded, and from the beginning of a run"
            )
        return MaskedUpdate(self.optimizer, self.tunable, estimation.selection)

    def frozen(self, warmup: int, max_iter: int) -> list[HookBase]:
        """Hooks that freeze the candidates in the warm-up, and the ViT's other weights always."""
        others = {name: p for name, p in self.parameters.items() if name not in self.tunable}
        return [
            FrozenWeights(self.optimizer, others, until=max_iter),
            FrozenWeights(self.optimizer, self.tunable, until=warmup),
        ]

    def log(self) -> None:
        """Logs once what FisherTune does to each part of the model."""
        if not comm.is_main_process():
            return
        around = count_parameters_around(self.model, self.path)
        logger.info(
            "FisherTune on %s (%s): %s of its weights may be selected, %s stay frozen in the whole "
            "run (embeddings, norms, output projections). Other parts train as before: %s",
            self.path,
            type(self.module).__name__,
            f"{self.most:,}",
            f"{self.base - self.most:,}",
            ", ".join(f"{count:,} of {name}" for name, count in around.items()) or "nothing",
        )


class FrozenWeights(HookBase):
    """Keeps parameters as they are up to an iteration, while an optimizer holds and steps them.

    Then the optimizer forgets them: AdamW also counts steps with gradients of 0. Its moments would
    grow from 0 without the correction for that start, and the first steps would be up to 3 times
    the learning rate.

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
        """Freezes them at the first step, because a checkpoint may be loaded before it."""
        if self.trainer.iter >= self.until:
            self.after_train()
            if self.trainer.iter == self.until:  # a run that resumes later goes on with its state
                for parameter in self.parameters.values():
                    self.optimizer.state.pop(parameter, None)
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
    """Sums the losses of a Detectron2 model in training: the loss of an image, if given one.

    Such a model gives one number for all images of a batch. The Fisher information, squares of
    each image's gradients, therefore needs the estimator ``diagonal_loop``, which passes one image
    at a time. A whole batch passes only when Eq. 6 takes its statistics, without a gradient.

    Args:
        model: returns losses by name, or their sum.
        batch: B images.

    Returns:
        (B,), all equal.

    Raises:
        ValueError: if gradients of more than one image are needed.
    """
    if len(batch) > 1 and torch.is_grad_enabled():
        raise ValueError(
            f"loss_of_one_image has one number for {len(batch)} images: use the estimator "
            "'diagonal_loop', or a loss_fn that gives one for each image"
        )
    losses = model(batch)
    total = sum(losses.values()) if isinstance(losses, Mapping) else losses
    return total.reshape(1).expand(len(batch))


def _require_trained(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer) -> None:
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if id(parameter) not in held or not parameter.requires_grad:
            raise ValueError(
                f"{name} of the backbone is frozen or not in the trainer's optimizer, so it could "
                "not move if it were selected: build both with the whole backbone trainable"
            )
