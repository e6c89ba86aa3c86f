"""One score per weight from F(x) and F(x') (Eq. 5, 7, 14, 15).

Every function maps parameter names to tensors of the parameter's shape. Scores are not negative.
A weight with F(x) = F(x') = 0, such as one outside the candidates, scores 0.
"""

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from .fisher_estimate import FisherEstimate

FORMS = ("balanced", "eq7", "eq15", "rank")
# The options of DRF; a config has them in capitals below FISHER.
OPTIONS = ("form", "gamma", "tau", "eps", "rho")
# The number of entries that are sorted at a time, of 20 bytes each.
RANKED_AT_ONCE = 2**24
_BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


def domain_related_fisher(
    estimate: FisherEstimate | Mapping[str, Tensor],
    f_shifted: Mapping[str, Tensor] | None = None,
    shift_weight: float = 1.0,
    *,
    form: str = "balanced",
    gamma: float = 1e-8,
    tau: float = 1.0,
    eps: float = 1e-8,
    rho: float = 0.01,
) -> dict[str, Tensor]:
    """The domain-related Fisher information, DRF: F(x) and the change dF as one score.

    F is of the order of 1e-8 and dF is a ratio of order 1, so Eq. 7 as printed ranks as dF alone.
    ``form`` says how the two terms are brought to one scale. ``balanced`` is Eq. 15 with constants
    from the estimate itself: gamma is the mean of F(x) over the candidates, and gamma * tau^-2,
    which damps the ratio, is ``rho`` times that mean.

    Args:
        estimate: F(x), F(x') and the weight of the shift.
        f_shifted: the former way to give F(x'), after F(x) by parameter name.
        shift_weight: the former way to give the weight of the shift, after ``f_shifted``.
        form: ``"balanced"``; ``"eq7"`` and ``"eq15"``, as printed; ``"rank"``, the sum of the
            two terms' ranks, scaled to (0, 1], the second times the weight of the shift. The ranks
            are on the CPU.
        gamma: weight of the KL term in Eq. 11; only for ``eq15``.
        tau: standard deviation of the prior; only for ``eq15``.
        eps: guard of the ratio in Eq. 5; for ``eq7``, ``eq15`` and ``rank``. ``balanced`` uses its
            damping instead, which scales with F.
        rho: damping of ``balanced``, as a share of the mean F(x).

    Returns:
        DRF by parameter name.

    Raises:
        ValueError: if ``form`` is unknown, the estimate lacks F(x'), the weight of the shift is out
            of range, or F(x) is 0 everywhere.
    """
    if form not in FORMS:
        raise ValueError(f"unknown form {form!r}: choose from {FORMS}")
    if f_shifted is not None or not isinstance(estimate, FisherEstimate):
        estimate = _former_estimate(estimate, f_shifted, shift_weight)
    if not estimate.shifted:
        raise ValueError(
            f"{estimate.source} has no F(x'), which DRF compares F(x) with: estimate with perturb="
        )
    f, f_shifted, shift_weight = estimate.f, estimate.shifted, estimate.shift_weight
    if not 0.0 < shift_weight <= 1.0:
        raise ValueError(f"shift_weight must be in (0, 1]: got {shift_weight}")
    if form == "balanced":
        gamma = mean_over_candidates(f)
        return _eq15(f, f_shifted, shift_weight, gamma, prior_precision=rho, eps=0.0)
    if form == "eq15":
        return _eq15(f, f_shifted, shift_weight, gamma, prior_precision=tau**-2, eps=eps)
    ratio = relative_change(f, f_shifted, eps)
    if form == "rank":
        f, ratio = _ranks(f), _ranks(ratio)
    return {name: f[name] + shift_weight * ratio[name] for name in f}  # Eq. 7


def _former_estimate(
    f: Mapping[str, Tensor], f_shifted: Mapping[str, Tensor] | None, shift_weight: float
) -> FisherEstimate:
    """The estimate of the former arguments, with a warning; refuses F(x) alone."""
    if f_shifted is None:
        raise TypeError(f"domain_related_fisher takes a FisherEstimate: got {type(f)}")
    warnings.warn(
        "domain_related_fisher(f, f_shifted, shift_weight) is now called with the estimate alone: "
        "domain_related_fisher(estimate)",
        FutureWarning,
        stacklevel=3,
    )
    return FisherEstimate(dict(f), dict(f_shifted), shift_weight, images=0)


def relative_change(
    f: Mapping[str, Tensor], f_shifted: Mapping[str, Tensor], eps: float
) -> dict[str, Tensor]:
    """DF of Eq. 5: |F(x) - F(x')| / (min(F(x), F(x')) + eps)."""
    return {
        name: (f[name] - f_shifted[name]).abs() / (torch.minimum(f[name], f_shifted[name]) + eps)
        for name in f
    }


def posterior_precision(f: Tensor, gamma: float, prior_precision: float) -> Tensor:
    """Lambda = F / gamma + tau^-2, the minimiser of Eq. 11 under Eq. 12 (Eq. 14 solved)."""
    return f / gamma + prior_precision


def fisher_from_precision(precision: Tensor, gamma: float, prior_precision: float) -> Tensor:
    """F = gamma * Lambda - gamma * tau^-2 (Eq. 14), clamped at 0."""
    # A Lambda learned by stochastic gradients may fall below the prior's.
    return (gamma * (precision - prior_precision)).clamp_min(0.0)


def mean_over_candidates(f: Mapping[str, Tensor]) -> float:
    """Mean of F over its entries above 0, which are candidates; refuses an F of 0 everywhere."""
    sums = torch.stack([value.sum(dtype=torch.float64) for value in f.values()])
    counts = torch.stack([torch.count_nonzero(value) for value in f.values()])
    total, count = sum(sums.tolist()), sum(counts.tolist())
    if count == 0:
        raise ValueError("F(x) is 0 for every weight: the loss does not reach the candidates")
    return total / count


def _eq15(
    f: Mapping[str, Tensor],
    f_shifted: Mapping[str, Tensor],
    shift_weight: float,
    gamma: float,
    prior_precision: float,
    eps: float,
) -> dict[str, Tensor]:
    scores = {}
    for name in f:
        lam = posterior_precision(f[name], gamma, prior_precision)
        lam_shifted = posterior_precision(f_shifted[name], gamma, prior_precision)
        ratio = (lam - lam_shifted).abs() / (torch.minimum(lam, lam_shifted) + eps / gamma)
        f_again = fisher_from_precision(lam, gamma, prior_precision)
        scores[name] = f_again + gamma * shift_weight * ratio  # Eq. 15
    return scores


def _ranks(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rank of each entry among all entries above 0, scaled to (0, 1], on the CPU; 0 stays 0."""
    # Parts of the range of values are sorted one by one, on the values' device, because the sort
    # takes most of the time. Memory: the ranks and one copy of the values on the CPU, and the
    # entries of one part, or all entries of one value if these are more.
    flat, device = flat_on_cpu(values), next(iter(values.values())).device
    ranks = torch.zeros_like(flat)
    total, before = int(torch.count_nonzero(flat > 0)), 0
    edges = _edges(flat, RANKED_AT_ONCE)
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        inside = flat > low
        places = inside.logical_and_(flat <= high).nonzero().flatten()
        # Floats above 0 sort as their bits do, and torch sorts whole numbers faster.
        bits = flat[places].view(_BITS[flat.dtype]).to(device)
        places = places[bits.argsort(stable=True).cpu()]
        ends = before + len(places)
        ranks[places] = (torch.arange(before + 1, ends + 1) / total).to(ranks.dtype)
        before = ends
    parts = ranks.split([value.numel() for value in values.values()])
    return {
        name: part.view_as(value) for (name, value), part in zip(values.items(), parts, strict=True)
    }


def _edges(flat: Tensor, most: int) -> list[float]:
    """Edges from 0 to infinity, with about ``most`` values above 0 between neighbouring edges."""
    sample = flat[:: max(1, len(flat) // 2**16)]  # the choice of edges changes no rank
    sample = sample[sample > 0].sort().values
    step = max(1, len(sample) * most // len(flat))
    return [0.0, *sample[step::step].unique().tolist(), float("inf")]


def best_first(values: Tensor) -> Tensor:
    """The places of the values, largest first; of equal values the first comes first.

    Args:
        values: not negative, float32 or float64, (n,).

    Returns:
        int64 (n,), on the device of the values.
    """
    # As in _ranks. The sum makes 0 of -0, whose bits are those of the smallest number.
    bits = (values + 0.0).view(_BITS[values.dtype])
    return bits.neg_().argsort(stable=True)


def flat_on_cpu(values: Mapping[str, Tensor]) -> Tensor:
    """All entries in the order of the mapping, (n,), in one transfer from the device."""
    return torch.cat([value.detach().flatten() for value in values.values()]).cpu()
