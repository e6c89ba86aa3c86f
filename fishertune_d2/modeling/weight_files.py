"""Reads the tensors of weights files, and runs nothing that the files hold.

A name may lead to one file, to a folder, or to a model in parts: transformers and its hub cut large
models into ``model-00001-of-00002.safetensors`` and so on, with an index that names each tensor's
part. safetensors files hold only tensors. PyTorch's files are pickles, which torch.load unpickles
with weights_only. The content of a file decides its format, not its name.
"""

import json
import logging
import re
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from fishertune_d2.files import first_names

from .torchscript import is_torchscript, read_torchscript

StateDict = dict[str, Tensor]

logger = logging.getLogger(__name__)

# The keys under which files keep the weights: MAE's, DINO's and EVA's ("model"), DeepSpeed's
# ("module"), DINO's ("teacher"), those of many scripts. The first key that a file has is read, so
# a student only without its teacher.
NESTS = (
    "model",
    "module",
    "state_dict",
    "teacher",
    "model_state_dict",
    "model_state",
    "net",
    "student",
)
# An average of the weights over training, as timm ("state_dict_ema") keeps it beside them.
_AVERAGE = re.compile(r"(?:.*[_.])?ema(?:_.*)?")
# Files that people mistake for weights, by their first bytes.
_NO_WEIGHTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run `git lfs pull` "
    "in its repository, or download the file",
    b"<": "it is a web page, not a file of weights: download the file that the page links to",
    b"{": "it is a text in JSON: name the weights file beside it",
    b"\x89HDF": "it is an HDF5 file of Keras: name PyTorch's or a safetensors file",
    b"GGUF": "it is a GGUF file of llama.cpp: name PyTorch's or a safetensors file",
}
# The files of a timm or transformers folder, the preferred one first.
_IN_A_FOLDER = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")
_ADDRESS = re.compile(r"[A-Za-z][\w+.-]+://")
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)")


def read_weights(place: str, key: str = "MODEL.VFM.WEIGHTS") -> StateDict:
    """Returns the tensors of a file, of all parts of a model, or of a folder, by name, on the CPU.

    Args:
        place: a file, see `read_checkpoint`; a part of a model or its index, from which all parts
            are read; a folder of timm or transformers, or one with a single weights file.
        key: the key of the config that names the place, for the messages.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is an address, a folder without weights, or a file that cannot be read.
    """
    if _ADDRESS.match(place):
        file = place.split("?")[0].rstrip("/").rsplit("/", 1)[-1]
        address = re.sub(r"(//huggingface\.co/.+)/blob/", r"\1/resolve/", place)
        raise ValueError(
            f"{place} is an address, and weights are read from files: download it first, with "
            f"`curl -L -o {file} '{address}'`, and set {key} to {file}"
        )
    path = Path(place).expanduser()
    if path.is_dir():
        return read_weights(str(_in_folder(path, key)), key)
    if not path.is_file():
        raise FileNotFoundError(f"no weights file {path}")
    if path.suffix == ".json":
        return _read_parts(path, _parts_of_index(path, key))
    part = _PART.fullmatch(path.name)
    if part:
        start, count, end = part[1], part[3], part[4]
        numbers = range(1, int(count) + 1)
        return _read_parts(path, [f"{start}-{number:05}-of-{count}{end}" for number in numbers])
    return read_checkpoint(path)


def _in_folder(folder: Path, key: str) -> Path:
    """Finds the file in a folder that holds its weights, or their index."""
    snapshots = folder / "snapshots"  # in the cache of Hugging Face's hub
    if snapshots.is_dir() and len(list(snapshots.iterdir())) == 1:
        folder = next(snapshots.iterdir())
    for name in _IN_A_FOLDER:
        if (folder / name).is_file():
            return folder / name
    files = sorted(path for path in folder.iterdir() if path.suffix in _SUFFIXES)
    models = {_PART.sub(r"\1\4", path.name) for path in files}
    if len(models) == 1:
        return files[0]
    found = first_names([path.name for path in files], 8) if files else "no weights"
    raise ValueError(
        f"{folder} is a folder with {found} in it: set {key} to one file (*{', *'.join(_SUFFIXES)})"
    )


def _parts_of_index(path: Path, key: str) -> list[str]:
    """Reads the names of a model's parts from its index."""
    try:
        return sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no index of weights ({type(error).__name__}: {error}): set "
            f"{key} to the file with the weights themselves, or to its folder"
        ) from error


def _read_parts(path: Path, names: list[str]) -> StateDict:
    """Reads all parts of a model from the folder of ``path``."""
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing:
        raise ValueError(
            f"{path} needs all of the {len(names)} parts of its model beside it, and these cannot "
            f"be found: {first_names(missing, 8)}. Download them, too"
        )
    state: StateDict = {}
    for name in names:
        state |= read_checkpoint(path.parent / name)
    return state


def read_checkpoint(path: Path) -> StateDict:
    """Reads the tensors of one file, see `read_with_notes`."""
    return read_with_notes(path)[0]


def read_with_notes(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """Reads a safetensors file, a PyTorch file or a TorchScript archive, of any name.

    A PyTorch file holds a state dict, bare or under one of ``NESTS``.

    Returns:
        Tensors by name, on the CPU, and the whole content of a PyTorch file (else an empty dict).

    Raises:
        ValueError: if the file is damaged, or holds more than tensors.
    """
    start = _first_bytes(path)
    notes: dict[str, Any] = {}
    state: Any
    try:
        if _is_safetensors(start):
            state = load_file(path)
        elif is_torchscript(path):
            state = read_torchscript(path)
        else:
            # Opened here, because torch.load trusts the ending of a path. A Namespace holds the
            # options that MAE and DINO save beside their models.
            with open(path, "rb") as file, torch.serialization.safe_globals([Namespace]):
                notes = torch.load(file, map_location="cpu", weights_only=True)
            state = _unnest(notes, path)
    # Each format has its own errors: pickle's, zip's, safetensors'.
    except Exception as error:
        reason = f"{type(error).__name__}: {_reason(error)}"
        raise ValueError(_unreadable(path, reason)) from error
    if not isinstance(state, Mapping):
        reason = f"it holds a {type(state).__name__}, and no tensors by name"
        raise ValueError(_unreadable(path, reason))
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: {first_names(state)}")
    return dict(state), notes


def _unreadable(path: Path, reason: str) -> str:
    return (
        f"cannot read weights from {path}: it is damaged, or holds more than tensors (such files "
        f"are refused, as they can run code): {reason}. Download it again, or save the tensors "
        "alone, with safetensors, where it was made"
    )


def _unnest(content: Any, path: Path) -> Any:
    """Returns the state dict in a file's content, under as many ``NESTS`` as there are."""
    while isinstance(content, Mapping):
        nest = next((nest for nest in NESTS if isinstance(content.get(nest), Mapping)), None)
        if nest is None:
            break
        mention_averages([name for name in content if name != nest], f"{path}: {nest!r}")
        content = content[nest]
    return content


def mention_averages(names: Iterable[Any], taken: str) -> None:
    """Warns if moving averages are among the names beside the weights that are ``taken``."""
    found = sorted(name for name in names if isinstance(name, str) and _AVERAGE.fullmatch(name))
    if found:
        logger.warning(
            f"{taken} is taken; the file also holds {' and '.join(map(repr, found))}, a moving "
            "average of the weights, which is not taken. Save it in a file of its own to use it"
        )


def _is_safetensors(start: bytes) -> bool:
    # The length of a JSON header in 8 bytes, and then the header.
    return start[5:9] == b"\0\0\0{"


def _first_bytes(path: Path) -> bytes:
    """Returns a file's first 64 bytes; refuses an empty file and files of other known kinds."""
    with open(path, "rb") as file:
        start = file.read(64)
    if _is_safetensors(start):  # whose first byte may be any, such as "<"
        return start
    if not start.strip():
        raise ValueError(f"cannot read weights from {path}: it is empty: download it again")
    for first, words in _NO_WEIGHTS.items():
        if start.lstrip().startswith(first):
            raise ValueError(f"cannot read weights from {path}: {words}")
    return start


def _reason(error: Exception) -> str:
    """Returns the first line of an error, for torch.load's the cause without the advice."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found:
        return f"the pickle asks for {found[1]}"
    text = text.rpartition("WeightsUnpickler error: ")[2]
    return (text.strip().splitlines() or [""])[0]
