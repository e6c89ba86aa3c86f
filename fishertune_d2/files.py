"""The cache folder, files that are written whole, tensor files, and long lists in messages."""

import json
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

_MIB = 2**20


def cache_root() -> Path:
    """The folder for files that FisherTune writes and can write again (FISHERTUNE_CACHE)."""
    return Path(os.environ.get("FISHERTUNE_CACHE") or "~/.cache/fishertune_d2").expanduser()


def first_names(names: Collection[object], most: int = 5, separator: str = ", ") -> str:
    """Joins the first names of a list and counts the rest: "a, b and 3 more", or "none"."""
    shown = separator.join(str(name) for name in list(names)[:most]) or "none"
    return f"{shown} and {len(names) - most} more" if len(names) > most else shown


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Replaces a file when the new one is complete, so that a kill leaves the old one, or none.

    A kill may also leave ``<name>.tmp``, which the next attempt overwrites. The file gets the
    permissions that the umask asks for, because safetensors makes files that only their owner can
    read.

    Yields:
        The path to write to.

    Raises:
        FileNotFoundError: if the folder is missing.
        OSError: if writing fails, as it does on a full disk; names the file and the free space.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} could not be written: there is no such folder")
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        permissions = _usual_permissions(path.with_name(f"{path.name}.{os.getpid()}"))
        yield temporary
        with open(temporary, "rb+") as file:
            os.fchmod(file.fileno(), permissions)
            os.fsync(file.fileno())  # or a power failure could leave the name without the content
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        written = temporary.stat().st_size if temporary.is_file() else 0
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"{path} could not be written, and what was there before is untouched: "
            f"{_system_error(error)}. The disk took {written / _MIB:,.1f} MiB of it, and has "
            f"{shutil.disk_usage(path.parent).free / _MIB:,.1f} MiB free without them: make room"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _usual_permissions(unused: Path) -> int:
    """The permissions of a new file. Python cannot read the umask without setting it."""
    unused.unlink(missing_ok=True)
    unused.touch()
    permissions = stat.S_IMODE(unused.stat().st_mode)
    unused.unlink()
    return permissions


def _system_error(error: BaseException) -> BaseException:
    """The system's own error, which torch.save hides behind one about its archive."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause or error


class TensorFile:
    """A safetensors file of one of our formats, open for reading.

    Attributes:
        names: the names of its tensors.
    """

    def __init__(self, file: safe_open, texts: dict[str, str]):
        self.names = frozenset(file.keys())
        self._file = file
        self._texts = texts

    def json(self, key: str, kind: type) -> Any:
        """The value of type ``kind`` that the metadata hold as JSON under ``key``."""
        if key not in self._texts:
            raise ValueError(f"its header lacks {key!r}")
        value = json.loads(self._texts[key])
        if type(value) is not kind:
            raise ValueError(f"its {key} is a {type(value).__name__}, where a {kind.__name__} was")
        return value

    def tensor(self, name: str) -> Tensor:
        """One tensor."""
        return self._file.get_tensor(name)


@contextmanager
def open_tensors(path: str | Path, *forms: str) -> Iterator[TensorFile]:
    """Opens a safetensors file whose metadata must name one of ``forms`` as their ``format``.

    Yields:
        The file. An error that the caller raises meanwhile gets the file's name, too.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another format, or refused by the caller.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with safe_open(str(path), framework="pt") as file:
            texts = file.metadata() or {}
            if (found := texts.get("format", "")) not in forms:
                other = found.startswith(forms[-1].rstrip("0123456789"))
                remedy = ": use the version of fishertune_d2 that wrote it" if other else ""
                known = " or ".join(map(repr, forms))
                raise ValueError(f"its format is {found!r}, not {known}{remedy}")
            yield TensorFile(file, texts)
    # safetensors, json (RecursionError is a RuntimeError) and PyTorch have errors of their own.
    except (SafetensorError, ValueError, RuntimeError, OSError) as error:
        raise ValueError(
            f"{path} cannot be used: {error}. Put back the file as it was written, or make it again"
        ) from error
