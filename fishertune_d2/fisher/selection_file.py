"""The file of a selection: what it holds, and the checks of a file that anyone may have written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fishertune_d2.files import TensorFile, open_tensors, whole_file

from .allocation import count_of_share
from .units import Units

_FORMAT = "fishertune_selection_v1"
# A file that claims more is damaged or hostile, and its masks would not fit in memory.
_MOST_WEIGHTS = 2**34


class Content(NamedTuple):
    """The content of a file; the attributes are those of :class:`.Selection`."""

    indices: dict[str, Tensor]
    ranks: dict[str, Tensor]
    shapes: dict[str, tuple[int, ...]]
    share: float
    base: int
    notes: dict[str, str]
    unit: str
    steps: dict[str, Tensor] | None


def write(path: str | Path, content: Content) -> None:
    """Writes a safetensors file; if that fails, an existing file stays."""
    tensors = {f"indices/{name}": t.cpu().contiguous() for name, t in content.indices.items()}
    tensors |= {f"ranks/{name}": t.cpu().contiguous() for name, t in content.ranks.items()}
    if content.steps is not None:  # versions that do not know such factors refuse the file
        tensors |= {f"steps/{name}": t.cpu().contiguous() for name, t in content.steps.items()}
    header = {"share": content.share, "base": content.base, "shapes": content.shapes}
    # Versions that know single weights alone read files of single weights.
    if content.unit != "weight":
        header["unit"] = content.unit
    texts = {"header": json.dumps(header), "notes": json.dumps(content.notes)}
    with whole_file(path) as temporary:
        save_file(tensors, str(temporary), metadata={"format": _FORMAT, **texts})


def read(path: str | Path) -> Content:
    """Reads a file, also from an untrusted source; refuses damaged ones."""
    with open_tensors(path, _FORMAT) as file:
        share, base, units = _read_header(file)
        indices = {name: file.tensor(f"indices/{name}") for name in units.groups}
        ranks = {name: file.tensor(f"ranks/{name}") for name in units.groups}
        for name, group in units.groups.items():
            _check_entries(name, indices[name], ranks[name], group.count)
        together = torch.cat([torch.empty(0, dtype=torch.int64), *ranks.values()]).sort().values
        if not torch.equal(together, torch.arange(len(together))):
            raise ValueError(f"its ranks are not the numbers from 0 to {len(together) - 1:,}")
        _require_full(ranks, units, share, base)
        steps = _read_steps(file, ranks)
        notes = file.json("notes", dict)
    return Content(indices, ranks, units.shapes, share, base, notes, units.unit, steps)


def ends_by_rank(ranks: Mapping[str, Tensor], units: Units) -> Tensor:
    """For each rank, the number of weights of the units up to it, int64 (n,)."""
    sizes = torch.zeros(sum(len(each) for each in ranks.values()), dtype=torch.int64)
    for name, each in ranks.items():
        sizes[each] = units.groups[name].size
    return sizes.cumsum(0)


def _read_header(file: TensorFile) -> tuple[float, int, Units]:
    """Share, base and the units; refuses impossible values."""
    header = file.json("header", dict)
    share, base, shapes = (header.get(key) for key in ("share", "base", "shapes"))
    if type(share) not in (int, float) or not 0 <= share <= 1:
        raise ValueError(f"its share is {share!r}, which is not in [0, 1]")
    if type(base) is not int or not 0 < base <= _MOST_WEIGHTS:
        raise ValueError(f"its base is {base!r}, which is no model's number of weights")
    if type(shapes) is not dict:
        raise ValueError("its header lacks the shapes")
    for name, shape in shapes.items():
        if type(shape) is not list or not all(type(n) is int and n > 0 for n in shape):
            raise ValueError(f"the shape of {name} is {shape!r}, which no parameter has")
    total = sum(math.prod(shape) for shape in shapes.values())
    if total > _MOST_WEIGHTS:
        raise ValueError(f"its shapes hold {total:,} weights, more than any model has")
    units = Units(header.get("unit", "weight"), {name: tuple(s) for name, s in shapes.items()})
    parts = ["indices", "ranks", *(["steps"] if _has_steps(file) else [])]
    expected = {f"{part}/{name}" for part in parts for name in units.groups}
    if file.names != expected:
        differing = sorted(file.names ^ expected)
        raise ValueError(f"its tensors are not those of its header: {differing[0]} differs")
    return share, base, units


def _has_steps(file: TensorFile) -> bool:
    return any(name.startswith("steps/") for name in file.names)


def _read_steps(file: TensorFile, ranks: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
    """The factors of the units' steps; refuses impossible ones."""
    if not _has_steps(file):
        return None
    steps = {name: file.tensor(f"steps/{name}") for name in ranks}
    for name, each in steps.items():
        if each.dtype != torch.float32 or each.shape != ranks[name].shape:
            raise ValueError(
                f"the steps of {name} are {each.dtype} of shape {tuple(each.shape)}, not float32 "
                f"of shape {tuple(ranks[name].shape)}"
            )
        if not bool(((each >= 0) & torch.isfinite(each)).all()):
            raise ValueError(f"the steps of {name} hold negative or non-finite numbers")
    return steps


def _check_entries(name: str, indices: Tensor, ranks: Tensor, numel: int) -> None:
    """Refuses units that the group does not have, or that are selected twice."""
    for what, values in (("indices", indices), ("ranks", ranks)):
        if values.dtype != torch.int64 or values.dim() != 1:
            shape = tuple(values.shape)
            raise ValueError(f"the {what} of {name} are {values.dtype} of shape {shape}, not int64")
    if len(indices) != len(ranks):
        raise ValueError(f"{name} has {len(indices):,} indices and {len(ranks):,} ranks")
    if len(indices) == 0:
        return
    places = indices.sort().values
    if places[0] < 0 or places[-1] >= numel:
        wrong = places[0] if places[0] < 0 else places[-1]
        raise ValueError(f"{name} has {numel:,} entries, and entry {int(wrong):,} is selected")
    if not bool((places.diff() > 0).all()):
        raise ValueError(f"an entry of {name} is selected twice")
    if not bool((ranks.diff() > 0).all()):
        raise ValueError(f"the ranks of {name} do not ascend")


def _require_full(ranks: Mapping[str, Tensor], units: Units, share: float, base: int) -> None:
    """Refuses more weights than the share, or room in it for another unit of any size."""
    ends, budget = ends_by_rank(ranks, units), count_of_share(share, base)
    held = int(ends[-1]) if len(ends) else 0
    largest = max((group.size for group in units.groups.values()), default=1)
    if not 0 <= budget - held < largest:
        kind = "entries" if units.unit == "weight" else f"weights in {len(ends):,} neurons"
        raise ValueError(
            f"it holds {held:,} {kind}, but a share of {share} of {base:,} is {budget:,} weights"
        )
