"""The Fisher information F(x) and F(x') of a model's candidates, and its file."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fishertune_d2.files import TensorFile, open_tensors, whole_file

from .units import Units

_FORMAT = "fisher_estimate_v1"


@dataclass
class FisherEstimate(Mapping[str, Tensor]):
    """F(x) and F(x') of a model's candidates; as a mapping, F(x) by parameter name.

    Attributes:
        f: F(x) by parameter name, in the parameter's shape, float32; 0 outside the candidates.
        shifted: F(x') in the same form; empty without a perturbation.
        shift_weight: mean over images of exp(-(|eps_mu| + |eps_sigma|)), in (0, 1].
        images: the number of images in the mean.
        notes: how it was measured (estimator, labels, seed, strength of the shift), as strings.
        source: the name for it in error messages: the file that it was read from.
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
        """The shape of each parameter, by name."""
        return {name: tuple(value.shape) for name, value in self.f.items()}

    def to(self, device: torch.device | str) -> "FisherEstimate":
        """The estimate on another device."""
        f = {name: value.to(device) for name, value in self.f.items()}
        shifted = {name: value.to(device) for name, value in self.shifted.items()}
        return replace(self, f=f, shifted=shifted)

    def by_unit(self, units: Units) -> "FisherEstimate":
        """The means of F(x) and F(x') over each unit, by group of units; see :meth:`Units.mean`."""
        return replace(
            self, f=units.mean(self.f), shifted=self.shifted and units.mean(self.shifted)
        )

    def save(self, path: str | Path) -> None:
        """Writes the estimate as a safetensors file; if that fails, an existing file stays."""
        tensors = {f"f/{name}": value.cpu().contiguous() for name, value in self.f.items()}
        tensors |= {f"shifted/{name}": v.cpu().contiguous() for name, v in self.shifted.items()}
        numbers = {"shift_weight": repr(float(self.shift_weight)), "images": str(self.images)}
        # The file sorts its tensors by name, but a selection breaks ties by the order in memory.
        texts = {"names": json.dumps(list(self.f)), "notes": json.dumps(self.notes)}
        with whole_file(path) as temporary:
            save_file(tensors, str(temporary), metadata={"format": _FORMAT, **texts, **numbers})

    @staticmethod
    def load_notes(path: str | Path) -> dict[str, str]:
        """Reads only the notes; raises the errors of :meth:`load`."""
        with open_tensors(path, _FORMAT) as file:
            return file.json("notes", dict)

    @classmethod
    def load(cls, path: str | Path) -> "FisherEstimate":
        """Reads a file of :meth:`save`, also from an untrusted source; refuses damaged files."""
        with open_tensors(path, _FORMAT) as file:
            weight, images = file.json("shift_weight", float), file.json("images", int)
            if not 0 <= weight <= 1 or images < 1:
                raise ValueError(f"its shift weight is {weight}, from {images} images")
            names = file.json("names", list)
            domains = ("f", "shifted") if len(file.names) > len(names) else ("f",)
            if file.names != {f"{domain}/{name}" for domain in domains for name in names}:
                raise ValueError("its tensors are not F(x) and F(x') of the names in its header")
            f = {name: _read_fisher(file, f"f/{name}") for name in names}
            shifted = {n: _read_fisher(file, f"shifted/{n}") for n in names if len(domains) == 2}
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
