"""A delta: the difference of a tuned backbone to the public weights, as one small file.

For each tensor the file stores the positions and the new values of what differs, so that applying
is exact to the bit: single entries, whole rows or whole columns, whichever takes the fewest bytes.
Comparing bits finds the entries that training moved, whatever was selected.

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

from fishertune_d2.files import TensorFile, first_names, open_tensors, whole_file

from .position_bytes import decode_positions, encode_positions
from .tensor_change import TensorChange, cheapest_change, different_bits

StateDict = dict[str, Tensor]

# Version 1 has no rows and no columns.
_FORMATS = ("fishertune_delta_v1", "fishertune_delta_v2")
# The positions of a tensor's change have the name POSITIONS/NAME, its values values/NAME.
_POSITIONS = {None: "gaps", 0: "rows", 1: "columns"}
_DIMENSIONS = {kind: dimension for dimension, kind in _POSITIONS.items()}
_KINDS = (*_DIMENSIONS, "values", "whole", "decoder")


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
        changes: what differs in tensors of ``base``.
        whole: tensors that were resized, or in which nearly everything differs.
        decoder: the rest of the segmentation model, by its names in a checkpoint; may be empty.
        changed: the number of entries that differ in the tensors of ``base``.
        notes: facts of the run, as strings.
        title: the name of the delta in messages.
    """

    architecture: Architecture
    base: dict[str, str]
    changes: dict[str, TensorChange] = field(default_factory=dict)
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
            differs = different_bits(before.detach().cpu(), after)
            changed = int(differs.sum())
            if not changed:
                continue
            delta.changed += changed
            change = cheapest_change(after, differs)
            if change is None:
                delta.whole[name] = after
            else:
                delta.changes[name] = change
        return delta

    def apply(self, state: Mapping[str, Tensor]) -> StateDict:
        """Returns the tuned weights in a new dict; changes no tensor of the base ``state``.

        The tensors have timm's names. Resized tensors need only the right size. Other tensors, such
        as a classifier's, are passed on.

        Raises:
            ValueError: if ``state`` is not the base, or a change does not fit it.
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
        for name, tensor in self.whole.items():
            if tensor.dtype != state[name].dtype:
                raise self._damaged(name, f"it is {tensor.dtype}, the model's {state[name].dtype}")
        tuned = dict(state)
        for name, tensor in self.whole.items():
            tuned[name] = tensor.to(state[name].device)
        for name, change in self.changes.items():
            try:
                tuned[name] = change.apply(state[name])
            except ValueError as error:
                raise self._damaged(name, error) from error
        return tuned

    def _damaged(self, name: str, reason: object) -> ValueError:
        return ValueError(
            f"{self.title} is damaged at {name}: {reason}. Copy or fetch the file again, or write "
            "it again with python -m fishertune_d2.export"
        )

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file."""
        tensors = {}
        for name, change in self.changes.items():
            tensors[f"{_POSITIONS[change.dimension]}/{name}"] = encode_positions(change.positions)
            tensors[f"values/{name}"] = change.values
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
                metadata={"format": _FORMATS[-1], "header": json.dumps(header)},
            )

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Reads a file of :meth:`save`, also from an untrusted source; refuses damaged files."""
        with open_tensors(path, *_FORMATS) as file:
            delta = _read_header(file.json("header", dict))
            _require_pairs(file.names, delta.base)
            for key in sorted(file.names):
                kind, _, name = key.partition("/")
                if kind in _DIMENSIONS:
                    delta.changes[name] = _read_change(file, kind, name)
                elif kind != "values":
                    getattr(delta, kind)[name] = file.tensor(key)
        delta.title = str(path)
        return delta


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


def _require_pairs(keys: Collection[str], base: Collection[str]) -> None:
    """Refuses unknown kinds, and a tensor with parts that are not those of one change.

    Args:
        keys: the names of the file's tensors.
        base: the names of the tensors that may change.

    Raises:
        ValueError: names the tensor.
    """
    kinds: dict[str, list[str]] = {}
    for key in sorted(keys):
        kind, _, name = key.partition("/")
        if kind not in _KINDS:
            raise ValueError(f"it holds {key}, which is none of {', '.join(_KINDS)}")
        if kind != "decoder":
            kinds.setdefault(name, []).append(kind)
    for name, found in kinds.items():
        if found == ["whole"]:
            continue
        if name not in base:
            raise ValueError(f"it has {found[0]} of {name}, which its base lacks")
        if len(found) != 2 or found[-1] != "values":
            raise ValueError(
                f"it has {' and '.join(found)} of {name}: a change has values and one of "
                f"{', '.join(_DIMENSIONS)}"
            )


def _read_change(file: TensorFile, kind: str, name: str) -> TensorChange:
    code, values = file.tensor(f"{kind}/{name}"), file.tensor(f"values/{name}")
    dimension = _DIMENSIONS[kind]
    if code.ndim != 1 or code.dtype != torch.uint8:
        raise ValueError(f"{kind}/{name} is {_layout(code)}, no vector of uint8")
    if values.ndim == 0 or (values.ndim == 1) != (dimension is None):
        raise ValueError(f"values/{name} is {_layout(values)}, which does not fit {kind}")
    positions = decode_positions(code)
    if len(positions) != len(values) or not len(positions):
        raise ValueError(f"it has {len(positions)} positions in {name}, and {len(values)} values")
    return TensorChange(dimension, positions, values)
