"""Reads the tensors of a TorchScript archive without running the program in it.

OpenAI publishes CLIP as such an archive. torch.load refuses it, and torch.jit.load would compile
and load the program. The archive holds the parameters in data.pkl and one file per storage. The
unpickler below knows only a few names, and builds an empty shell where the pickle asks for a class
of the program.
"""

import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

_DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def is_torchscript(path: Path) -> bool:
    """Whether a file is a zip with the constants of a program, which is torch.load's test too."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as archive:
        return any(PurePosixPath(name).name == "constants.pkl" for name in archive.namelist())


def read_torchscript(path: Path) -> dict[str, Tensor]:
    """Returns the parameters and buffers of the module in an archive, by name, on the CPU.

    An archive that asks for a name that is not known to be harmless raises a
    ``pickle.UnpicklingError``.
    """
    with ZipFile(path) as archive:
        pickles = [n for n in archive.namelist() if PurePosixPath(n).name == "data.pkl"]
        root = PurePosixPath(pickles[0]).parent
        with archive.open(pickles[0]) as file:
            module = TensorUnpickler(file, archive, root / "data").load()
    return dict(_named_tensors(module))


class _Shell:
    """An object of the archived program: its attributes without its behaviour."""

    def __setstate__(self, state: Any) -> None:
        self.attributes = state if isinstance(state, dict) else {}


def _named_tensors(module: _Shell, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the names and tensors of a module and of its submodules."""
    for name, value in module.attributes.items():
        if isinstance(value, Tensor):
            yield f"{prefix}{name}", value
        elif isinstance(value, _Shell):
            yield from _named_tensors(value, f"{prefix}{name}.")


class TensorUnpickler(pickle.Unpickler):
    """Unpickles tensors, containers and shells, and refuses every other name.

    A pickle runs code by naming a function and having it called. This pickle can call only what
    ``find_class`` returns.
    """

    def __init__(self, file: IO[bytes], archive: ZipFile, folder: PurePosixPath):
        super().__init__(file)
        self._archive = archive
        self._folder = folder

    def find_class(self, module: str, name: str) -> Any:
        """Returns a type of tensor, a container or a harmless function; refuses other names."""
        if module.split(".")[0] == "__torch__":
            return _Shell
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}")
        return _KNOWN[module, name]

    def persistent_load(self, reference: tuple) -> Tensor:
        """Returns the numbers of one storage as a tensor of one dimension."""
        _, dtype, key, _device, _count = reference
        buffer = bytearray(self._archive.read(str(self._folder / key)))
        return torch.frombuffer(buffer, dtype=dtype)


def _tensor(storage: Tensor, offset: int, size: tuple, stride: tuple, *_: Any) -> Tensor:
    """Returns a tensor as a view of its storage."""
    return storage.as_strided(size, stride, offset)


def _first(value: Any, *_: Any) -> Any:
    """Returns a list as it is, without the type that TorchScript stores beside it."""
    return value


_KNOWN: dict[tuple[str, str], Callable] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch.jit._pickle", "restore_type_tag"): _first,
    ("torch.jit._pickle", "build_intlist"): _first,
    ("torch.jit._pickle", "build_doublelist"): _first,
    ("torch.jit._pickle", "build_boollist"): _first,
    ("torch.jit._pickle", "build_tensorlist"): _first,
}
