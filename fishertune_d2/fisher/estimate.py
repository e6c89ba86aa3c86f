"""The diagonal Fisher information on x and on its simulated shift x' (Eq. 4, 8, 9).

For each weight n, over the images i:

    F_n = mean_i (d L_i / d theta_n)^2

**Reduction**: L_i is the loss of one image, with whatever reduction over its own pixels the loss
has; the square is taken per image; the mean runs over images, and over all processes. The square
of a batch-mean gradient is a different and smaller number. Scaling every loss by c scales F by
c^2, which no ranking sees, except where ``eps`` of Eq. 5 is compared with F.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from .candidates import Candidate
from .perturb import StatisticsPerturbation

LossFn = Callable[[nn.Module, Sequence], Tensor]


@dataclass
class FisherEstimate(Mapping[str, Tensor]):
    """F(x) by parameter name, and what was measured beside it.

    Attributes:
        f: name to F(x), in the parameter's shape, float32; entries that are no candidates are 0.
        shifted: the same on x'; empty if no perturbation was given.
        shift_weight: mean over images of exp(-(|eps_mu| + |eps_sigma|)), in (0, 1].
        images: how many images went into the mean.
    """

    f: dict[str, Tensor]
    shifted: dict[str, Tensor]
    shift_weight: float
    images: int

    def __getitem__(self, name: str) -> Tensor:
        return self.f[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.f)

    def __len__(self) -> int:
        return len(self.f)

    def save(self, path: str | Path) -> None:
        """Writes the estimate as a safetensors file."""
        tensors = {f"f/{name}": value.cpu().contiguous() for name, value in self.f.items()}
        tensors |= {f"shifted/{name}": v.cpu().contiguous() for name, v in self.shifted.items()}
        numbers = {"shift_weight": repr(self.shift_weight), "images": str(self.images)}
        save_file(tensors, str(path), metadata={"format": "fisher_estimate", **numbers})

    @classmethod
    def load(cls, path: str | Path) -> "FisherEstimate":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: if the file holds something else.
        """
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "fisher_estimate":
                raise ValueError(f"{path} is no Fisher estimate: its format is {metadata}")
            tensors: dict[str, dict[str, Tensor]] = {"f": {}, "shifted": {}}
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                part, name = key.split("/", 1)
                tensors[part][name] = file.get_tensor(key)
        return cls(
            tensors["f"],
            tensors["shifted"],
            float(metadata["shift_weight"]),
            int(metadata["images"]),
        )


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Sequence],
    loss_fn: LossFn,
    candidates: Sequence[Candidate],
    *,
    estimator: str = "closed_form",
    perturb: StatisticsPerturbation | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FisherEstimate:
    """Measures F(x), and F(x') if a perturbation is given, without changing any weight.

    x and x' see the same random numbers (a loss that draws points draws the same ones), so that
    their difference is the shift's, and exactly 0 if the shift is switched off. Dropout and
    stochastic depth are off meanwhile. Where a process group exists, every process gives its own
    batches, and sums are reduced over processes before the mean is taken.

    Args:
        model: any module that holds the candidates; its mode and weights stay as they are.
        batches: each a sequence of B images (or dicts, or a tensor) that ``batch[i : i + 1]``
            splits; B of at least 2, or x' is x.
        loss_fn: ``(model, batch) -> (B,)``, one loss per image of the batch. It is called on
            batches of one, and without gradients on whole batches to measure Eq. 6's statistics.
        candidates: what :func:`~fishertune_d2.fisher.find_candidates` found in ``model``.
        estimator: a key of :data:`ESTIMATORS`.
        perturb: Eq. 6 with the points to perturb.
        seed: of the perturbation's and the loss's random numbers.
        progress: show a bar, on a terminal.

    Returns:
        The estimate, on the device of the parameters.

    Raises:
        ValueError: if there is no batch, or ``estimator`` is unknown.
        FloatingPointError: if a gradient is not finite, with the parameter's name and the image.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: choose from {sorted(ESTIMATORS)}")
    with _dropout_off(model):
        return ESTIMATORS[estimator](
            model, tqdm(batches, "Fisher", disable=None if progress else True), loss_fn,
            candidates, perturb, seed,
        )  # fmt: skip


def _squares_by_image(
    model: nn.Module,
    batches: Iterable[Sequence],
    loss_fn: LossFn,
    candidates: Sequence[Candidate],
    perturb: StatisticsPerturbation | None,
    seed: int,
) -> FisherEstimate:
    """Eq. 9 as a plain loop: one backward pass for each image, on x and on x'."""
    parameters = {c.name: c.parameter for c in candidates}
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in parameters.items()}
    shifted = {name: torch.zeros_like(t) for name, t in total.items()} if perturb else {}
    device = next(iter(total.values())).device
    # Images seen and the sum of their shift weights; float64 to count exactly.
    counts = torch.zeros(2, dtype=torch.float64, device=device)

    for step, batch in enumerate(batches):
        if perturb is not None:
            with _seeded(seed, _rank(), step, -1), torch.no_grad(), perturb.drawing():
                loss_fn(model, batch)
            counts[1] += perturb.weights().sum().item()
        for i in range(len(batch)):
            one, place = batch[i : i + 1], f"image {i} of batch {step}"
            with _seeded(seed, _rank(), step, i):
                _add_squares(total, loss_fn(model, one), parameters, place)
            if perturb is not None:
                with _seeded(seed, _rank(), step, i), perturb.replaying(i):
                    _add_squares(shifted, loss_fn(model, one), parameters, f"shifted {place}")
        counts[0] += len(batch)

    if _is_distributed():
        for tensor in [counts, *total.values(), *shifted.values()]:
            torch.distributed.all_reduce(tensor)
    images = int(counts[0])
    if images == 0:
        raise ValueError("no batch to estimate the Fisher information from")
    for tensor in [*total.values(), *shifted.values()]:
        tensor.div_(images)
    for name in total:
        keep = _candidate_rows(name, total[name], candidates)
        for sums in (total, shifted) if perturb else (total,):
            sums[name][~keep] = 0.0
    weight = counts[1].item() / images if perturb else 1.0
    return FisherEstimate(total, shifted, weight, images)


# With the constants gamma and tau of Eq. 11, the closed-form minimiser of the free energy is
# Lambda = F / gamma + tau^-2 (score.py), so what has to be measured is F itself.
ESTIMATORS = {"closed_form": _squares_by_image}


def _add_squares(
    sums: dict[str, Tensor], loss: Tensor, parameters: dict[str, nn.Parameter], place: str
) -> None:
    names = list(parameters)
    gradients = torch.autograd.grad(loss.sum(), list(parameters.values()), allow_unused=True)
    for name, gradient in zip(names, gradients, strict=True):
        if gradient is None:  # a parameter the loss does not reach has no influence on it
            continue
        if not torch.isfinite(gradient).all():
            raise FloatingPointError(f"the gradient of {name} is not finite on {place}")
        sums[name].addcmul_(gradient.float(), gradient.float())


def _candidate_rows(name: str, like: Tensor, candidates: Sequence[Candidate]) -> Tensor:
    keep = torch.zeros(like.shape[0], dtype=torch.bool, device=like.device)
    for candidate in candidates:
        if candidate.name == name:
            keep[candidate.rows] = True
    return keep


@contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Random numbers that depend on ``numbers`` alone; the global state is put back after."""
    mixed = 0
    for number in numbers:
        mixed = (mixed * 1_000_003 + number + 7) % (2**63)
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(mixed)
        yield


@contextmanager
def _dropout_off(model: nn.Module) -> Iterator[None]:
    """Dropout and stochastic depth in eval mode, everything else as it is."""
    noisy = [m for m in model.modules() if m.training and "Drop" in type(m).__name__]
    for module in noisy:
        module.eval()
    try:
        yield
    finally:
        for module in noisy:
            module.train()


def _is_distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _rank() -> int:
    return torch.distributed.get_rank() if _is_distributed() else 0
