"""Finds the files that hold the weights which a person names, whole or in parts.

transformers and its hub cut large models into parts, ``model-00001-of-00002.safetensors`` and so
on, with an index beside them that names the part of each tensor.
"""

import json
import re
from pathlib import Path

from .checkpoints import StateDict, read_checkpoint

# What a folder of timm's or transformers' holds, the preferred first.
IN_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def read_weights(place: str) -> StateDict:
    """Reads the tensors of a file, of all the parts of a model, or of a folder.

    Args:
        place: a file, see ``read_checkpoint``; one part of several, or their index, which read all
            parts; a folder as timm and transformers write it, or with one such file in it.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is an address, a folder without weights, or a file that cannot be read.
    """
    if _ADDRESS.match(place):
        file = place.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
        address = re.sub(r"(//huggingface\.co/.+)/blob/", r"\1/resolve/", place)
        raise ValueError(
            f"{place} is an address, and weights are read from files: download it first, with "
            f"`curl -L -o {file} '{address}'`, and set MODEL.VFM.WEIGHTS to {file}"
        )
    path = Path(place).expanduser()
    if path.is_dir():
        return read_weights(str(_in_folder(path)))
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".json":
        return _read_parts(path, _parts_of_index(path))
    part = _PART.fullmatch(path.name)
    if part:
        start, count, end = part[1], part[3], part[4]
        numbers = range(1, int(count) + 1)
        return _read_parts(path, [f"{start}-{number:05}-of-{count}{end}" for number in numbers])
    return read_checkpoint(path)


def _in_folder(folder: Path) -> Path:
    """The file in a folder that holds its weights, or their index."""
    snapshots = folder / "snapshots"  # as the cache of Hugging Face's hub keeps a model
    if snapshots.is_dir() and len(list(snapshots.iterdir())) == 1:
        folder = next(snapshots.iterdir())
    for name in IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    parts = {_PART.sub(r"\1\4", path.name) for path in files}
    if len(parts) == 1:
        return files[0]
    found = ", ".join(path.name for path in files[:8])
    raise ValueError(
        f"{folder} is a folder with {found if files else 'no weights'} in it: set "
        f"MODEL.VFM.WEIGHTS to one file (*{', *'.join(_SUFFIXES)})"
    )


def _parts_of_index(path: Path) -> list[str]:
    """The names of the files that an index names."""
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of weights ({type(error).__name__}: {error}): set "
            "MODEL.VFM.WEIGHTS to the file with the weights themselves, or to its folder"
        ) from error


def _read_parts(path: Path, names: list[str]) -> StateDict:
    """Reads all parts of a model, which lie beside ``path``."""
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} needs all of the {len(names)} parts of its model beside it, and "
            f"{', '.join(missing[:8])} of them cannot be found: download these, too"
        )
    state: StateDict = {}
    for name in names:
        state |= read_checkpoint(path.parent / name)
    return state
