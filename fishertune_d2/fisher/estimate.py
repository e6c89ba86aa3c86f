"""Measures F(x) and F(x') over batches (Eq. 4 to 14).

x and x' see the same random numbers (a loss that draws points draws the same ones), so that their
difference is the shift's. With the shift switched off, the difference is exactly 0 on the CPU; on a
GPU it is a rounding error, because some backward passes add in varying order. During the estimate
dropout and stochastic depth are off, batch norms use and keep their running statistics, and no
activations are checkpointed. In a process group, every process gives its own batches, as many as
the others, and sums are reduced over processes before the mean is taken. Random numbers belong to
the k-th batch of all, which is batch k // W of process k % W.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from .activations import keeping_activations
from .batch_losses import BatchLosses, LossFn, mixed_seed
from .candidates import Candidate
from .estimators import ESTIMATORS
from .estimators.estimator import Estimator
from .fisher_estimate import FisherEstimate
from .perturb import Perturbation
from .processes import rank_and_size, sum_over_processes

LABELS = ("ground_truth", "sampled")


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Sequence],
    loss_fn: LossFn,
    candidates: Sequence[Candidate],
    *,
    estimator: str | Callable[[Sequence[Candidate]], Estimator] = "diagonal",
    labels: str = "ground_truth",
    perturb: Perturbation | None = None,
    seed: int = 0,
    progress: bool = True,
    autocast: torch.dtype | None = None,
) -> FisherEstimate:
    """Measures F(x), and F(x') if a perturbation is given, without changing any weight.

    A loss or gradient that is not finite raises a FloatingPointError, which names the parameter and
    the image. A model that does not fit the estimator raises a ValueError with the remedy.

    Args:
        model: any module that holds the candidates; its mode and weights stay the same.
        batches: each a sequence of B images (or dicts, or a tensor) that ``batch[i : i + 1]``
            splits; B of at least 2, or x' is x.
        loss_fn: ``(model, batch) -> (B,)``, one loss per image of the batch, with any reduction
            over its own pixels. An image's loss must not depend on the rest of its batch.
        candidates: the result of :func:`fishertune_d2.fisher.find_candidates` on ``model``.
        estimator: a key of :data:`ESTIMATORS`, or a function from the candidates to an estimator,
            such as ``partial(Variational, resolution="neuron")``.
        labels: ``"ground_truth"``, those in the batch (the empirical Fisher), or ``"sampled"``,
            drawn from the model (Eq. 4's expectation): ``loss_fn.sampled(model, batch)`` draws them
            and returns their negative log-likelihood, (B,); see :class:`.SoftmaxLikelihood`.
        perturb: makes x': Eq. 6 with the points to perturb, or an :class:`.ImageShift`.
        seed: seed of the random numbers of the perturbation and the loss.
        progress: show a bar, on a terminal.
        autocast: ``torch.bfloat16`` to compute losses and gradients under autocast; None not to.
            Sums are float32 in any case. An autocast around this call has no effect.

    Returns:
        The estimate, on the device of the parameters.
    """
    _require_known(candidates, labels, autocast)
    name, on_x = _build_estimator(estimator, candidates)
    notes = {"estimator": name, "labels": labels, "seed": str(seed)}
    if on_x.version > 1:
        notes["version"] = str(on_x.version)
    domains: list[tuple[Perturbation | None, Estimator]] = [(None, on_x)]
    if perturb is not None:
        notes |= perturb.notes()
        domains.append((perturb, on_x.fresh()))
    batch_losses = partial(
        BatchLosses, model=model, loss_fn=_with_labels(loss_fn, labels), autocast=autocast
    )
    with _ready_to_measure(model, candidates):
        images, weight = _pass_all(batches, domains, batch_losses, seed, progress)
    measured = [gathered.fisher() for _, gathered in domains]
    _require_finite_sums(*measured)
    shifted = measured[1] if perturb is not None else {}
    return FisherEstimate(measured[0], shifted, weight, images, notes)


def _pass_all(
    batches: Iterable[Sequence],
    domains: Sequence[tuple[Perturbation | None, Estimator]],
    batch_losses: Callable[..., BatchLosses],
    seed: int,
    progress: bool,
) -> tuple[int, float]:
    """Updates all estimators; returns the images of all processes and the mean shift weight."""
    rank, world = rank_and_size()
    device = domains[0][1].device
    # Images seen and the sum of their shift weights; float64 to count exactly.
    counts = torch.zeros(2, dtype=torch.float64, device=device)
    for step, batch in enumerate(tqdm(batches, "Fisher", disable=None if progress else True)):
        for perturb, estimator in domains:
            losses = batch_losses(
                batch=batch,
                perturb=perturb,
                seed=mixed_seed(seed, step * world + rank),
                name=f"batch {step}",
                device_type=device.type,
            )
            estimator.update(losses)
        counts[0] += len(batch)
        shift = domains[-1][0]
        counts[1] += len(batch) if shift is None else shift.weights(batch).sum().item()
    sum_over_processes([counts])
    images, weights = counts.tolist()
    if images == 0:
        raise ValueError("no batch to estimate the Fisher information from")
    return int(images), weights / images


def _require_known(
    candidates: Sequence[Candidate], labels: str, autocast: torch.dtype | None
) -> None:
    if labels not in LABELS:
        raise ValueError(f"unknown labels {labels!r}: choose from {LABELS}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast must be None or torch.bfloat16: got {autocast}; squares of gradients "
            "underflow in float16"
        )
    if not candidates:
        raise ValueError("there is no candidate to estimate the Fisher information of")


def _build_estimator(
    estimator: str | Callable[[Sequence[Candidate]], Estimator], candidates: Sequence[Candidate]
) -> tuple[str, Estimator]:
    if not isinstance(estimator, str):
        built = estimator(candidates)
        return type(built).__name__, built
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: choose from {sorted(ESTIMATORS)}")
    return estimator, ESTIMATORS[estimator](candidates)


def _with_labels(loss_fn: LossFn, labels: str) -> LossFn:
    if labels == "ground_truth":
        return loss_fn
    if not hasattr(loss_fn, "sampled"):
        raise ValueError(
            f"labels='sampled' needs a loss_fn with a method sampled(model, batch) -> (B,): "
            f"{loss_fn} has none; a classifier's is SoftmaxLikelihood"
        )
    return loss_fn.sampled


def _require_finite_sums(*estimates: Mapping[str, Tensor]) -> None:
    # Each gradient was finite, but a square may overflow.
    found = [(name, value) for estimate in estimates for name, value in estimate.items()]
    finite = torch.stack([value.isfinite().all() for _, value in found]).tolist()  # one wait
    for (name, value), fine in zip(found, finite, strict=True):
        if not fine:
            raise FloatingPointError(
                f"the Fisher information of {name} overflows {value.dtype}: scale the loss down"
            )


@contextmanager
def _ready_to_measure(model: nn.Module, candidates: Sequence[Candidate]) -> Iterator[None]:
    """Prepares a model for an estimate, and restores its state afterwards."""
    # Images must not mix, in batch norms, nor be dropped in part.
    set_aside = [
        m
        for m in model.modules()
        if m.training and ("Drop" in type(m).__name__ or isinstance(m, _BatchNorm))
    ]
    # The candidates of a frozen model can be measured too.
    frozen = [c.parameter for c in candidates if not c.parameter.requires_grad]
    for module in set_aside:
        module.eval()
    for parameter in frozen:
        parameter.requires_grad_(True)
    # An autocast outside must reach neither the squares nor the backward passes.
    device = candidates[0].parameter.device
    try:
        with torch.autocast(device.type, enabled=False), keeping_activations(model):
            yield
    finally:
        for module in set_aside:
            module.train()
        for parameter in frozen:
            parameter.requires_grad_(False)
