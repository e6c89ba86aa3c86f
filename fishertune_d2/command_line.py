"""The parts that all commands share: the option ``--import``, and an end in one sentence.

An error whose cause the user can fix ends a command in one sentence, without a traceback.
"""

import argparse
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from yaml import YAMLError

# If this variable is set, the traceback is printed above the sentence.
TRACEBACK = "FISHERTUNE_TRACEBACK"

# A missing or forbidden file is an OSError, a loss that is not finite a FloatingPointError.
_ALWAYS = (FloatingPointError, OSError, YAMLError)
# Modules that read configs and look up registered names.
_CONFIG_READERS = ("fvcore.", "yacs.", "detectron2.config", "detectron2.data.catalog")


def add_import_option(parser: argparse.ArgumentParser) -> None:
    """Adds ``--import FILE``, whose files :func:`import_files` reads as ``options.imports``."""
    parser.add_argument(
        "--import",
        dest="imports",
        action="append",
        default=[],
        metavar="FILE",
        help="a Python file of yours, which registers a method, a VFM or a data set; repeatable",
    )


def import_files(files: Sequence[str]) -> None:
    """Executes Python files as modules of their names, each once in a process.

    A command calls it before it reads a config, and so does every process that it starts.

    Args:
        files: the values of ``--import``.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no Python file, or Python has another module of its name.
    """
    for file in files:
        path = Path(file).resolve()
        if not path.is_file():
            raise FileNotFoundError(f"--import {file}: there is no such file")
        loaded = sys.modules.get(path.stem)
        if loaded is not None and getattr(loaded, "__file__", None) == str(path):
            continue
        spec = spec_from_file_location(path.stem, path)
        if spec is None or spec.loader is None:
            raise ValueError(f"--import {file}: name a Python file, with the ending .py")
        if loaded is not None or path.stem in sys.stdlib_module_names:
            raise ValueError(
                f"--import {file}: Python has another module {path.stem}: rename the file"
            )
        module = module_from_spec(spec)
        sys.modules[path.stem] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[path.stem]
            raise


def import_arguments(files: Sequence[str]) -> list[str]:
    """The words that give the option ``--import`` to a command in another process."""
    return [word for file in files for word in ("--import", str(Path(file).resolve()))]


@contextmanager
def ending_in_a_sentence(code: int = 1) -> Iterator[None]:
    """Turns an error that a user can fix into ``error: ...`` on stderr and an exit code.

    Wrap the work of every process of a command in it: a parent reads the exit code of its children.
    Errors of the program itself keep their traceback.

    Args:
        code: the exit code, not 0; 2 if 1 has another meaning.

    Yields:
        Nothing.

    Raises:
        SystemExit: with the code, after the sentence.
    """
    try:
        yield
    except Exception as error:
        if not can_be_mended(error):
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        sys.stdout.flush()  # so that earlier output stays above the sentence
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None


def can_be_mended(error: BaseException) -> bool:
    """Whether a user can fix the cause, so that the error's text is enough without a traceback."""
    if isinstance(error, KeyError):  # a registry's sentence, not the key of some dict
        return " " in sentence(error)
    if isinstance(error, AssertionError):
        return _module(error).startswith(_CONFIG_READERS)
    if isinstance(error, ImportError):  # one of ours, which says what to install, has no name
        return error.name is None
    return isinstance(error, (ValueError, *_ALWAYS))


def sentence(error: BaseException) -> str:
    """The text of an error, all paragraphs of it, for the user."""
    # A KeyError's own text is in quotation marks.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if not text.strip():
        text = type(error).__name__
    # A ValueError of another library often names nothing that the user typed, so add its line.
    ours = type(error).__module__.startswith(__package__)
    if isinstance(error, ValueError) and not ours and not isinstance(error, _ALWAYS):
        module = _module(error)
        if module and not module.startswith((__package__, "__main__", *_CONFIG_READERS)):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text += f" ({module}, line {frame.lineno}; {TRACEBACK}=1 shows the traceback)"
    return text


def _module(error: BaseException) -> str:
    """The module that raised an error, "" if none did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""
