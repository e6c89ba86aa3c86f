"""F(x) and F(x'): the estimate, its file, and the loop over batches that makes it (Eq. 4 to 14)."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from tqdm import tqdm

from fishertune_d2.files import TensorFile, open_tensors, whole_file

from .activations import keeping_activations
from .batch_losses import BatchLosses, LossFn, mixed_seed
from .batch_mean import BatchMean
from .candidates import Candidate
from .closed_form import ClosedForm
from .cost import Cost
from .diagonal import Diagonal, DiagonalLoop
from .natural import Natural
from .perturb import StatisticsPerturbation
from .processes import rank_and_size, sum_over_processes
from .smoothed import Smoothed
from .variational import Variational


class Estimator(Protocol):
    """Gathers F over batches of one domain, x or x'.

    Attributes:
        cost: what that takes.
    """

    cost: Cost

    def update(self, losses: BatchLosses) -> None:
        """Takes in one batch."""

    def fresh(self) -> "Estimator":
        """Another one with the same options, that has seen nothing."""

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name, over all processes, so far; 0 for what is no candidate."""


ESTIMATORS: dict[str, Callable[[Sequence[Candidate]], Estimator]] = {
    "diagonal": Diagonal,
    "diagonal_loop": DiagonalLoop,
    "smoothed": Smoothed,
    "closed_form": ClosedForm,
    "variational": Variational,
    "natural": Natural,
    "batch_mean": BatchMean,
}
LABELS = ("ground_truth", "sampled")
_FORMAT = "fisher_estimate_v1"


@dataclass
class FisherEstimate(Mapping[str, Tensor]):
    """F(x) by parameter name, and what was measured beside it.

    Attributes:
        f: name to F(x), in the parameter's shape, float32; entries that are no candidates are 0.
        shifted: the same on x'; empty if no perturbation was given.
        shift_weight: mean over images of exp(-(|eps_mu| + |eps_sigma|)), in (0, 1].
        images: how many images went into the mean.
        notes: how it was made (estimator, labels, seed, strength of the shift), as strings.
        source: what an error calls it: the file that it was read from.
    """

    f: dict[str, Tensor]
    shifted: dict[str, Tensor]
    shift_weight: float
    images: int
    notes: dict[str, str] = field(default_factory=dict)
    source: str = field(default="the estimate", compare=False)

    def __getitem__(self, name: str) -> Tensor:
        return self.f[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.f)

    def __len__(self) -> int:
        return len(self.f)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """By parameter name, the parameter's shape."""
        return {name: tuple(value.shape) for name, value in self.f.items()}

    def to(self, device: torch.device | str) -> "FisherEstimate":
        """The same on another device."""
        f, shifted = (
            {name: value.to(device) for name, value in part.items()}
            for part in (self.f, self.shifted)
        )
        return replace(self, f=f, shifted=shifted)

    def save(self, path: str | Path) -> None:
        """Writes the estimate as a safetensors file.

        Raises:
            OSError: if it cannot be written; a file that is there already stays.
        """
        tensors = {f"f/{name}": value.cpu().contiguous() for name, value in self.f.items()}
        tensors |= {f"shifted/{name}": v.cpu().contiguous() for name, v in self.shifted.items()}
        numbers = {"shift_weight": repr(float(self.shift_weight)), "images": str(self.images)}
        # The file sorts its tensors by name; a selection breaks ties by the order here.
        texts = {"names": json.dumps(list(self.f)), "notes": json.dumps(self.notes)}
        with whole_file(path) as temporary:
            save_file(tensors, str(temporary), metadata={"format": _FORMAT, **texts, **numbers})

    @staticmethod
    def load_notes(path: str | Path) -> dict[str, str]:
        """Reads the notes alone; raises as :meth:`load`."""
        with open_tensors(path, _FORMAT) as file:
            return file.json("notes", dict)

    @classmethod
    def load(cls, path: str | Path) -> "FisherEstimate":
        """Reads what :meth:`save` wrote, from whomever the file comes.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is damaged, of another format, or what it holds is no estimate.
        """
        with open_tensors(path, _FORMAT) as file:
            weight, images = file.json("shift_weight", float), file.json("images", int)
            if not 0 <= weight <= 1 or images < 1:
                raise ValueError(f"its shift weight is {weight}, from {images} images")
            names = file.json("names", list)
            f = {name: _read_fisher(file, f"f/{name}") for name in names}
            shifted = {
                name: _read_fisher(file, f"shifted/{name}")
                for name in names
                if f"shifted/{name}" in file.names
            }
            if len(file.names) != len(f) + len(shifted) or len(shifted) not in (0, len(f)):
                raise ValueError("its tensors are not F(x) and F(x') of the names in its header")
            for name, value in shifted.items():
                if value.shape != f[name].shape:
                    raise ValueError(f"F(x) and F(x') of {name} differ in shape")
            notes = file.json("notes", dict)
        return cls(f, shifted, weight, images, notes, str(path))


def _read_fisher(file: TensorFile, name: str) -> Tensor:
    value = file.tensor(name)
    if value.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {value.dtype}, in which squares of gradients underflow")
    if not bool(((value >= 0) & value.isfinite()).all()):
        raise ValueError(f"{name} holds negative or non-finite numbers")
    return value


def estimate_fisher(
    model: nn.Module,
    batches: Iterable[Sequence],
    loss_fn: LossFn,
    candidates: Sequence[Candidate],
    *,
    estimator: str | Callable[[Sequence[Candidate]], Estimator] = "diagonal",
    labels: str = "ground_truth",
    perturb: StatisticsPerturbation | None = None,
    seed: int = 0,
    progress: bool = True,
    autocast: torch.dtype | None = None,
) -> FisherEstimate:
    """Measures F(x), and F(x') if a perturbation is given, without changing any weight.

    x and x' see the same random numbers (a loss that draws points draws the same ones), so that
    their difference is the shift's. If the shift is switched off, it is exactly 0 on the CPU; on a
    GPU it is a rounding error, for some backward passes add in another order every time. Dropout
    and stochastic depth are off meanwhile, batch norms keep and use their running statistics, and
    no activations are checkpointed. Where a process group exists, every process gives its own
    batches, as many as the others, and sums are reduced over processes before the mean is taken.
    Random numbers belong to the k-th batch of all, which is batch k // W of process k % W.

    Args:
        model: any module that holds the candidates; its mode and weights stay as they are.
        batches: each a sequence of B images (or dicts, or a tensor) that ``batch[i : i + 1]``
            splits; B of at least 2, or x' is x.
        loss_fn: ``(model, batch) -> (B,)``, one loss per image of the batch, whatever its own
            reduction over pixels. An image's loss must not depend on the rest of its batch.
        candidates: what :func:`fishertune_d2.fisher.find_candidates` found in ``model``.
        estimator: a key of :data:`ESTIMATORS`, or a function from the candidates to an estimator,
            such as ``partial(Variational, resolution="row")``.
        labels: ``"ground_truth"``, those in the batch (the empirical Fisher), or ``"sampled"``,
            drawn from the model (Eq. 4's expectation): then ``loss_fn.sampled(model, batch)`` is
            called instead, which must return the negative log-likelihood of labels that it draws
            from the model's own distribution, (B,); see
            :class:`fishertune_d2.fisher.SoftmaxLikelihood`.
        perturb: Eq. 6 with the points to perturb.
        seed: of the perturbation's and the loss's random numbers.
        progress: show a bar, on a terminal.
        autocast: ``torch.bfloat16`` to compute losses and gradients under autocast; None not to.
            Sums are float32 in any case, and an autocast that is on outside is switched off.

    Returns:
        The estimate, on the device of the parameters.

    Raises:
        ValueError: if there is no batch or no candidate, an argument is unknown, model and loss do
            not fit the estimator, or the model checkpoints activations whatever its flags say.
        FloatingPointError: if a loss or gradient is not finite, with the parameter's name and the
            image.
    """
    if isinstance(estimator, str) and estimator not in ESTIMATORS:
        raise ValueError(f"unknown estimator {estimator!r}: choose from {sorted(ESTIMATORS)}")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(
            f"autocast must be None or torch.bfloat16: got {autocast}; squares of gradients "
            "underflow in float16"
        )
    if not candidates:
        raise ValueError("there is no candidate to estimate the Fisher information of")
    loss_fn = _with_labels(loss_fn, labels)
    rank, world = rank_and_size()
    device = candidates[0].parameter.device
    named = isinstance(estimator, str)
    on_x = (ESTIMATORS[estimator] if named else estimator)(candidates)
    notes = {
        "estimator": estimator if named else type(on_x).__name__,
        "labels": labels,
        "seed": str(seed),
    }
    if perturb is not None:
        notes |= {"strength": str(perturb.strength), "eps_mode": perturb.eps_mode}
    domains: list[tuple[StatisticsPerturbation | None, Estimator]] = [(None, on_x)]
    if perturb is not None:
        domains.append((perturb, on_x.fresh()))
    # Images seen and the sum of their shift weights; float64 to count exactly.
    counts = torch.zeros(2, dtype=torch.float64, device=device)

    # An autocast that is on outside must not reach the squares, nor the backward passes.
    plain = torch.autocast(device.type, enabled=False)
    apart, kept = _images_apart(model), keeping_activations(model)
    with plain, apart, kept, _requiring_gradients(candidates):
        for step, batch in enumerate(tqdm(batches, "Fisher", disable=None if progress else True)):
            for shift, gathered in domains:
                gathered.update(
                    BatchLosses(
                        model,
                        batch,
                        loss_fn,
                        perturb=shift,
                        seed=mixed_seed(seed, step * world + rank),
                        name=f"batch {step}",
                        autocast=autocast,
                        device_type=device.type,
                    )
                )
            counts[0] += len(batch)
            if perturb is not None:
                counts[1] += perturb.weights().sum().item()

    sum_over_processes([counts])
    images, weights = counts.tolist()
    if images == 0:
        raise ValueError("no batch to estimate the Fisher information from")
    measured = [gathered.fisher() for _, gathered in domains]
    _require_finite_sums(*measured)
    f, shifted, weight = measured[0], {}, 1.0
    if perturb is not None:
        shifted, weight = measured[1], weights / images
    return FisherEstimate(f, shifted, weight, int(images), notes)


def _with_labels(loss_fn: LossFn, labels: str) -> LossFn:
    if labels not in LABELS:
        raise ValueError(f"unknown labels {labels!r}: choose from {LABELS}")
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
def _images_apart(model: nn.Module) -> Iterator[None]:
    """Dropout, stochastic depth and batch norms in eval mode, everything else as it is."""
    set_aside = [
        m
        for m in model.modules()
        if m.training and ("Drop" in type(m).__name__ or isinstance(m, _BatchNorm))
    ]
    for module in set_aside:
        module.eval()
    try:
        yield
    finally:
        for module in set_aside:
            module.train()


@contextmanager
def _requiring_gradients(candidates: Sequence[Candidate]) -> Iterator[None]:
    """Candidates of a frozen model can be measured too; the flags are put back after."""
    frozen = [c.parameter for c in candidates if not c.parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)
