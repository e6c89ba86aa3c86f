"""Reads the tensors of a checkpoint, and runs nothing that the file holds.

safetensors holds tensors only. PyTorch's own files are pickles, which torch.load unpickles with
weights_only. Which of them a file is, its content says, not its name.

A TorchScript archive, as which OpenAI publishes CLIP, is refused by torch.load, and torch.jit.load
would compile and load the program in it. Its parameters lie beside the program, in data.pkl and one
file per storage: these are read here, by an unpickler that knows a handful of names and builds an
empty shell where the pickle asks for a class of the program.
"""

import logging
import pickle
import re
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from safetensors.torch import load_file
from torch import Tensor

StateDict = dict[str, Tensor]

logger = logging.getLogger(__name__)

# Where the weights lie: MAE, DINO and EVA's ("model"), DeepSpeed's ("module"), DINO's ("teacher"),
# many scripts' of their own. The first that is there is taken, a student only without its teacher.
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
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


# What files hold that people take for weights, by their first bytes.
_NO_WEIGHTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself: run `git lfs pull` "
    "in its repository, or download the file",
    b"<": "it is a web page, not a file of weights: download the file that the page links to",
    b"{": "it is a text in JSON: name the file with the weights that lies beside it",
    b"\x89HDF": "it is an HDF5 file of Keras: name PyTorch's or a safetensors file",
    b"GGUF": "it is a GGUF file of llama.cpp: name PyTorch's or a safetensors file",
}


def read_checkpoint(path: Path) -> StateDict:
    """Reads a state dict, bare or under one of ``NESTS``, or a TorchScript archive's parameters.

    Args:
        path: a safetensors file, PyTorch's or a TorchScript archive, of any name.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds more than tensors.
    """
    return read_with_notes(path)[0]


def read_with_notes(path: Path) -> tuple[StateDict, dict[str, Any]]:
    """Reads a state dict, and what PyTorch's file holds beside it.

    Args:
        path: as of :func:`read_checkpoint`, which also says what is raised.

    Returns:
        Tensors by name, on the CPU, and the whole content of PyTorch's file, else nothing.
    """
    path = Path(path)
    _require_weights(path)
    notes: dict[str, Any] = {}
    try:
        if _is_safetensors(path):
            state = load_file(path)
        elif _is_torchscript(path):
            state = _read_torchscript(path)
        else:
            # Not by its path, whose ending torch.load believes. A Namespace holds the options
            # that MAE and DINO save beside their models.
            with open(path, "rb") as file, torch.serialization.safe_globals([Namespace]):
                state = notes = torch.load(file, map_location="cpu", weights_only=True)
            state = _unnest(state, path)
            if not isinstance(state, Mapping):
                raise TypeError(f"it holds a {type(state).__name__}, and no tensors by name")
    # Each format has errors of its own: pickle's, zip's, safetensors'.
    except Exception as error:
        raise ValueError(
            f"cannot read weights from {path}: it is damaged, or holds more than tensors (such "
            f"files are refused, as they can run code): {type(error).__name__}: {_reason(error)}. "
            "Download it again, or save the tensors alone, with safetensors, where it was made"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: {', '.join(map(str, list(state)[:5]))}")
    return state, notes


def _unnest(content: Any, path: Path) -> Any:
    """The state dict inside of what a file holds, however deep it lies under ``NESTS``."""
    while isinstance(content, Mapping):
        nest = next((nest for nest in NESTS if isinstance(content.get(nest), Mapping)), None)
        if nest is None:
            break
        mention_averages([name for name in content if name != nest], f"{path}: {nest!r}")
        content = content[nest]
    return content


def mention_averages(names: Iterable[Any], taken: str) -> None:
    """Warns of averages that lie beside the weights that are taken, and may be the better ones.

    Args:
        names: of what lies beside them.
        taken: says what is taken, and from where.
    """
    found = sorted(name for name in names if isinstance(name, str) and _AVERAGE.fullmatch(name))
    if found:
        logger.warning(
            f"{taken} is taken; the file also holds {' and '.join(map(repr, found))}, a moving "
            "average of the weights, which is not taken. Save it in a file of its own to use it"
        )


def _require_weights(path: Path) -> None:
    """Refuses what is no file of weights."""
    with open(path, "rb") as file:
        start = file.read(64).lstrip()
    if not start:
        raise ValueError(f"cannot read weights from {path}: it is empty: download it again")
    for first, words in _NO_WEIGHTS.items():
        if start.startswith(first):
            raise ValueError(f"cannot read weights from {path}: {words}")


def _is_safetensors(path: Path) -> bool:
    """Whether a file opens with the length of a header in JSON, and the header."""
    with open(path, "rb") as file:
        start = file.read(9)
    return len(start) == 9 and start[8:] == b"{" and start[5:8] == bytes(3)


def _reason(error: Exception) -> str:
    """The first line of an error; of torch.load's, what stopped it, without its advice."""
    text = str(error)
    found = re.search(r"GLOBAL (\S+)", text)
    if found:
        return f"the pickle asks for {found[1]}"
    text = text.rpartition("WeightsUnpickler error: ")[2]
    return (text.strip().splitlines() or [""])[0]


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with the constants of a program, as torch.load decides it."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def _read_torchscript(path: Path) -> StateDict:
    """The parameters and buffers of the module in a TorchScript archive."""
    with ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl"]
        root = PurePosixPath(pickles[0]).parent
        with archive.open(pickles[0]) as file:
            module = _TensorUnpickler(file, archive, root / "data").load()
    return dict(_named_tensors(module))


class _Shell:
    """Stands for an object of the archived program: attributes without behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _named_tensors(module: _Shell, prefix: str = ""):
    """Yields (name, tensor) of a module and of those inside it."""
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Shell):
            yield from _named_tensors(value, f"{prefix}{name}.")


class _TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors, containers and shells, and refuses every other name.

    A pickle runs code by naming a function and having it called. Here the names that ``find_class``
    returns are all that can be called.
    """

    def __init__(self, file, archive: ZipFile, folder: PurePosixPath):
        super().__init__(file)
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle gets for a name.

        Raises:
            pickle.UnpicklingError: the name is not known to be harmless.
        """
        if module.split(".")[0] == "__torch__":
            return _Shell
        if module == "torch" and name in DTYPES:
            return DTYPES[name]
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch.jit._pickle", "restore_type_tag"): _first,
            ("torch.jit._pickle", "build_intlist"): _first,
            ("torch.jit._pickle", "build_doublelist"): _first,
            ("torch.jit._pickle", "build_boollist"): _first,
            ("torch.jit._pickle", "build_tensorlist"): _first,
        }
        if (module, name) not in known:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")
        return known[module, name]

    def persistent_load(self, reference: tuple) -> Tensor:
        """The numbers of one storage; ``reference`` is ("storage", type, key, device, count)."""
        _, dtype, key, _, _ = reference
        buffer = bytearray(self._archive.read(str(self._folder / key)))
        return torch.frombuffer(buffer, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_) -> Tensor:
    """A tensor as a view of its storage."""
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_) -> Any:
    """A list as it is, without the type that TorchScript notes beside it."""
    return value
