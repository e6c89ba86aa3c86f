"""A delta: the difference of a tuned backbone to the public weights, as one small file.

For each tensor the file stores the positions and the new values of the entries that differ, so that
applying is exact to the bit. Comparing bits finds the entries that training moved, whatever was
selected.

Loading public weights resizes the patch kernel and the position embedding, and the last bits of the
result depend on the processor: between torch's code for AVX2 and its plain code
(ATEN_CPU_CAPABILITY=default), nearly every second entry differs. So the file stores resized tensors
whole, and hashes only the other tensors of the base, which are equal everywhere. Therefore a delta
also fits a model that was resized by other rules.

This module does not need Detectron2.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fishertune_d2.files import first_names, open_tensors, whole_file

from .position_bytes import decode_positions, encode_positions

StateDict = dict[str, Tensor]

_FORMAT = "fishertune_delta_v1"
_KINDS = ("gaps", "values", "whole", "decoder")
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class Architecture:
    """The facts of a backbone beside its weights.

    Attributes:
        vfm: a name in ``fishertune_d2.modeling.VFMS``.
        timm_name: the timm model, and after a dot the tag of its public weights.
        img_size: (H, W) in pixels, for which the position embedding is stored.
        patch_size: side of a patch in pixels.
        pixel_mean: mean of the images, per channel in RGB order, 0..255.
        pixel_std: standard deviation of the images, likewise.
    """

    vfm: str
    timm_name: str
    img_size: tuple[int, int]
    patch_size: int
    pixel_mean: tuple[float, float, float]
    pixel_std: tuple[float, float, float]

    def __str__(self) -> str:
        return f"{self.timm_name} with img_size={self.img_size} and patch_size={self.patch_size}"


@dataclass
class Delta:
    """The difference between a tuned backbone and its base, by timm's names.

    Attributes:
        architecture: the backbone's.
        base: the digest of each tensor of the base that was not resized.
        positions: the entries of each flattened tensor that differ; int64 (n,), ascending.
        values: the new values of these entries; (n,).
        whole: tensors that were resized, or in which nearly every entry differs.
        decoder: the rest of the segmentation model, by its names in a checkpoint; may be empty.
        changed: the number of entries that differ in the tensors of ``base``.
        notes: facts of the run, as strings.
        title: the name of the delta in messages.
    """

    architecture: Architecture
    base: dict[str, str]
    positions: StateDict = field(default_factory=dict)
    values: StateDict = field(default_factory=dict)
    whole: StateDict = field(default_factory=dict)
    decoder: StateDict = field(default_factory=dict)
    changed: int = 0
    notes: dict[str, str] = field(default_factory=dict)
    title: str = "the delta"

    @classmethod
    def between(
        cls,
        base: Mapping[str, Tensor],
        tuned: Mapping[str, Tensor],
        architecture: Architecture,
        resized: Collection[str] = (),
    ) -> "Delta":
        """Returns the delta, without notes, of two backbones of one architecture, bit by bit.

        Args:
            base: the public weights, at the sizes of ``tuned``.
            tuned: the same tensors after training.
            architecture: the architecture of both.
            resized: names of the tensors whose public size differs.

        Raises:
            ValueError: if names, shapes or types of the two differ.
        """
        if base.keys() != tuned.keys():
            lacking, surplus = base.keys() - tuned.keys(), tuned.keys() - base.keys()
            raise ValueError(
                f"the tuned weights do not fit {architecture}: they lack "
                f"{first_names(sorted(lacking), 3)}, and have the surplus "
                f"{first_names(sorted(surplus), 3)}"
            )
        delta = cls(architecture, base={})
        for name, before in base.items():
            after = tuned[name].detach().cpu()
            if (after.shape, after.dtype) != (before.shape, before.dtype):
                raise ValueError(
                    f"the tuned weights do not fit {architecture}: {name} is {_layout(after)}, "
                    f"not {_layout(before)}"
                )
            if name in resized:
                delta.whole[name] = after
                continue
            delta.base[name] = digest(before)
            positions = torch.nonzero(_bits(before.cpu()) != _bits(after)).flatten()
            delta.changed += len(positions)
            if len(positions) * (after.itemsize + 1) >= after.nbytes > 0:
                delta.whole[name] = after
            elif len(positions):
                delta.positions[name] = positions
                delta.values[name] = after.flatten()[positions]
        return delta

    def apply(self, state: Mapping[str, Tensor]) -> StateDict:
        """Returns the tuned weights in a new dict; changes no tensor of the base ``state``.

        The tensors have timm's names. Resized tensors need only the right size. Other tensors, such
        as a classifier's, are passed on.

        Raises:
            ValueError: if ``state`` is not the base, or positions or values do not fit it.
        """
        missing = [name for name in {**self.base, **self.whole} if name not in state]
        if missing:
            raise ValueError(
                f"{self.title} is for {self.architecture}; the model lacks "
                f"{first_names(sorted(missing), 3)}"
            )
        for name, tensor in self.whole.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"{self.title} is for {self.architecture}, in which {name} is "
                    f"{_layout(tensor)}; the model's is {_layout(state[name])}: build it with that "
                    "size"
                )
        other = [name for name, expected in self.base.items() if digest(state[name]) != expected]
        if other:
            raise ValueError(
                f"{self.title} is a difference to other weights than the model holds: "
                f"{len(other)} of {len(self.base)} tensors differ, "
                f"{first_names(sorted(other), 3)}. It was made for {self.architecture}, "
                f"with the weights of {self.notes.get('weights', 'its run')}: "
                "load these, in the same precision, and apply it once"
            )
        for name, tensor in {**self.whole, **self.values}.items():
            if tensor.dtype != state[name].dtype:
                raise ValueError(
                    f"{self.title} is damaged: its {name} is {tensor.dtype}, the model's "
                    f"{state[name].dtype}. {_REMEDY}"
                )
        tuned = dict(state)
        for name, tensor in self.whole.items():
            tuned[name] = tensor.to(state[name].device)
        for name, positions in self.positions.items():
            before, values = state[name], self.values[name]
            if int(positions[-1]) >= before.numel():
                raise ValueError(
                    f"{self.title} is damaged: it changes entry {int(positions[-1])} of {name}, "
                    f"which has {before.numel()}. {_REMEDY}"
                )
            flat = before.detach().clone(memory_format=torch.contiguous_format).view(-1)
            flat[positions.to(flat.device)] = values.to(flat.device)
            tuned[name] = flat.view(before.shape)
        return tuned

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {}
        for name, positions in self.positions.items():
            tensors[f"gaps/{name}"] = encode_positions(positions)
            tensors[f"values/{name}"] = self.values[name]
        tensors |= {f"whole/{name}": tensor for name, tensor in self.whole.items()}
        tensors |= {f"decoder/{name}": tensor for name, tensor in self.decoder.items()}
        header = {
            "architecture": asdict(self.architecture),
            "base": self.base,
            "changed": self.changed,
            "notes": self.notes,
        }
        with whole_file(path) as temporary:
            save_file(
                {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()},
                temporary,
                metadata={"format": _FORMAT, "header": json.dumps(header)},
            )

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Reads a file of :meth:`save`, also from an untrusted source; refuses damaged files."""
        with open_tensors(path, _FORMAT) as file:
            delta = _read_header(file.json("header", dict))
            for name in sorted(file.names):
                _add_tensor(delta, name, file.tensor(name))
            _require_pairs(delta)
        delta.title = str(path)
        return delta


_REMEDY = "Copy or fetch the file again, or write it again with python -m fishertune_d2.export"


def apply_delta(model: nn.Module, delta: Delta | str | Path) -> None:
    """Turns public weights into tuned ones, in place; on an error, nothing is changed.

    The model is a ``VFMBackbone``, or a plain timm ViT of the delta's architecture and sizes, with
    the public weights in it. A damaged delta, or one for another model or other weights, raises a
    ValueError.
    """
    if not isinstance(delta, Delta):
        delta = Delta.load(delta)
    vit = getattr(model, "vit", model)
    vit.load_state_dict(delta.apply(vit.state_dict()))


def digest(tensor: Tensor) -> str:
    """Computes the SHA-256 of a tensor's type, shape and bytes."""
    content = hashlib.sha256(_layout(tensor).encode())
    content.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return content.hexdigest()


def _bits(tensor: Tensor) -> Tensor:
    """Returns the flattened entries as integers: NaN equals itself, and 0.0 is not -0.0."""
    return tensor.detach().contiguous().reshape(-1).view(_INTEGERS[tensor.itemsize])


def _layout(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _read_header(header: dict[str, Any]) -> Delta:
    try:
        found = header["architecture"]
        patch_size, changed = _numbers(int, 2, [found["patch_size"], header["changed"]])
        architecture = Architecture(
            vfm=_text(found["vfm"]),
            timm_name=_text(found["timm_name"]),
            img_size=_numbers(int, 2, found["img_size"]),
            patch_size=patch_size,
            pixel_mean=_numbers(float, 3, found["pixel_mean"]),
            pixel_std=_numbers(float, 3, found["pixel_std"]),
        )
        base = {name: _text(value) for name, value in header["base"].items()}
        notes = {name: _text(value) for name, value in header["notes"].items()}
    except (AttributeError, KeyError, TypeError) as error:  # missing keys, values of other types
        raise ValueError(f"its header is damaged ({type(error).__name__}: {error})") from error
    return Delta(architecture, base, changed=changed, notes=notes)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a text is {value!r}")
    return value


def _numbers(kind: type[int] | type[float], count: int, values: Sequence) -> tuple:
    if len(values) != count or not all(isinstance(v, kind | int) and v >= 0 for v in values):
        raise TypeError(f"{count} numbers, {kind.__name__}, of at least 0 are {values!r}")
    return tuple(values)


def _add_tensor(delta: Delta, key: str, tensor: Tensor) -> None:
    """Adds a tensor of the file to the delta."""
    kind, _, name = key.partition("/")
    if kind not in _KINDS:
        raise ValueError(f"it holds {key}, which is none of {', '.join(_KINDS)}")
    if kind in ("gaps", "values") and tensor.ndim != 1:
        raise ValueError(f"{key} is {_layout(tensor)}, no vector")
    if kind == "gaps":
        if tensor.dtype != torch.uint8:
            raise ValueError(f"{key} is {tensor.dtype}, not uint8")
        delta.positions[name] = decode_positions(tensor)
    else:
        getattr(delta, kind)[name] = tensor


def _require_pairs(delta: Delta) -> None:
    """Refuses positions without values, or of a tensor that the base lacks or that is whole."""
    for name in delta.positions.keys() | delta.values.keys():
        if name not in delta.base or name in delta.whole:
            raise ValueError(f"it has no use for entries of {name}")
        positions, values = (len(d.get(name, ())) for d in (delta.positions, delta.values))
        if positions != values or not positions:
            raise ValueError(f"it has {positions} positions in {name}, and {values} values")
