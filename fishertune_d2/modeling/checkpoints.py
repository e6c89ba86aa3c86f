"""Reads the tensors of a checkpoint, and runs nothing that the file holds.

safetensors holds tensors only. PyTorch's own files are pickles, which torch.load unpickles with
weights_only. A TorchScript archive, as which OpenAI publishes CLIP, is refused by that, and
torch.jit.load would compile and load the program in it. Its parameters lie beside the program, in
data.pkl and one file per storage: these are read here, by an unpickler that knows a handful of
names and builds an empty shell where the pickle asks for a class of the program.
"""

import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from timm.models import load_state_dict
from torch import Tensor

StateDict = dict[str, Tensor]

# Where the weights lie: MAE, DINO and EVA's ("model"), DeepSpeed's ("module"), DINO's ("teacher").
NESTS = ("model", "module", "state_dict", "teacher")
DTYPES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "BoolStorage": torch.bool,
}


def read_checkpoint(path: Path) -> StateDict:
    """Reads a state dict, bare or under one of ``NESTS``, or a TorchScript archive's parameters.

    Args:
        path: a safetensors file, PyTorch's (.pth, .pt, .bin) or a TorchScript archive.

    Returns:
        Tensors by name, on the CPU.

    Raises:
        ValueError: the file is damaged, or holds more than tensors.
    """
    try:
        if _is_torchscript(path):
            state = _read_torchscript(path)
        else:
            state = load_state_dict(str(path), use_ema=False, weights_only=True)
            for nest in NESTS:
                state = state.get(nest, state)
    # Each format has errors of its own: pickle's, zip's, safetensors', timm's.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"cannot read weights from {path}: it is damaged, or holds more than tensors (such "
            f"files are refused, as they can run code): {type(error).__name__}: {reason}"
        ) from error
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError(f"{path} holds no state dict: {', '.join(map(str, list(state)[:5]))}")
    return state


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
