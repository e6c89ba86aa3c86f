"""The short way to a selection: estimate, score and rank in one call."""

from collections.abc import Callable, Iterable, Sequence

from torch import nn

from .allocation import ALLOCATIONS, count_of_share
from .batch_losses import LossFn
from .candidates import Candidate, find_candidates
from .estimate import estimate_fisher
from .estimators.estimator import Estimator
from .perturb import Perturbation, StatisticsPerturbation, with_spread
from .score import domain_related_fisher
from .selection import Selection
from .unit_steps import STEPS, steps_of_units
from .units import Units


def select(
    model: nn.Module,
    batches: Iterable[Sequence],
    loss_fn: LossFn,
    share: float = 0.05,
    *,
    base: int | None = None,
    labels: str = "ground_truth",
    estimator: str | Callable[[Sequence[Candidate]], Estimator] = "diagonal",
    perturb: Perturbation | None = None,
    unit: str = "weight",
    allocation: str = "global",
    steps: str = "equal",
) -> Selection:
    """Selects the units with the highest domain-related Fisher information (Eq. 3 to 15).

    Needs a ViT with timm's names, or a model that contains one. For other models, other constants
    and other scores, call the parts: :func:`find_candidates`, :func:`estimate_fisher`,
    :func:`domain_related_fisher`, :meth:`Selection.from_scores`. Their errors are raised here too,
    and a share or a word that cannot work is refused before the estimate.

    Args:
        model: its weights stay the same.
        batches: see :func:`estimate_fisher`; at least two images each, or Eq. 6 shifts
            nothing; a last batch may have one.
        loss_fn: ``(model, batch) -> (B,)``, see :func:`estimate_fisher`.
        share: share of ``base`` to select, in [0, 1].
        base: a number of weights; by default all of the model. (Paper: the backbone alone.)
        labels: ``"ground_truth"`` or ``"sampled"``, see :func:`estimate_fisher`.
        estimator: see :func:`estimate_fisher`.
        perturb: the simulated shift; by default :meth:`StatisticsPerturbation.of_vit` of the model.
        unit: ``"weight"`` or ``"neuron"``, see :class:`Units`.
        allocation: ``"global"`` or ``"layer"``, see :meth:`Selection.from_scores`.
        steps: ``"equal"``, or ``"fisher"`` for the factors of :func:`steps_of_units`.

    Returns:
        The selection, by the parameter names of ``model``.
    """
    candidates = find_candidates(model)
    units = Units(unit, {c.name: tuple(c.parameter.shape) for c in candidates})
    if base is None:
        base = sum(parameter.numel() for parameter in model.parameters())
    _require_possible(share, base, units, allocation, steps)
    perturb = perturb or StatisticsPerturbation.of_vit(model)
    estimate = estimate_fisher(
        model,
        with_spread(batches, perturb),
        loss_fn,
        candidates,
        estimator=estimator,
        labels=labels,
        perturb=perturb,
    )
    scores = domain_related_fisher(estimate.by_unit(units))
    selection = Selection.from_scores(scores, share, base, units, allocation)
    if steps == "fisher":
        selection.steps = steps_of_units(estimate.f, selection)
    selection.notes |= estimate.notes | {"images": str(estimate.images)}
    return selection


def _require_possible(share: float, base: int, units: Units, allocation: str, steps: str) -> None:
    """Refuses before the estimate what would stop the ranking after it."""
    for name, value, known in (("allocation", allocation, ALLOCATIONS), ("steps", steps, STEPS)):
        if value not in known:
            raise ValueError(f"unknown {name} {value!r}: choose from {', '.join(known)}")
    most = sum(group.count * group.size for group in units.groups.values())
    if not (0.0 <= share <= 1.0 and count_of_share(share, base) <= most):
        raise ValueError(
            f"a share of {share} of {base:,} weights cannot be selected: choose from 0 to at most "
            f"{int(1000 * min(1.0, most / base)) / 1000}, since {most:,} are candidates"
        )
