"""How a command ends when a user can mend what is wrong: with one sentence, without a traceback."""

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from yaml import YAMLError

from fishertune_d2.data.image_files import DatasetError

# Set it to anything, and the traceback stands above the sentence.
TRACEBACK = "FISHERTUNE_TRACEBACK"

# A file that is missing or forbidden is an OSError; a loss that is not finite, a
# FloatingPointError.
_ALWAYS = (DatasetError, FloatingPointError, OSError, YAMLError)
# What reads configs and finds things by their names, for users as for us.
_CONFIG_READERS = ("fvcore.", "yacs.", "detectron2.config", "detectron2.data.catalog")


@contextmanager
def ending_in_a_sentence(code: int = 1) -> Iterator[None]:
    """Turns an error that a user can mend into ``error: ...`` on stderr and an exit code.

    For what a command does, in every process of it: a child that leaves with an exit code is known
    to its parent by that code. Errors of the program itself keep their traceback.

    Args:
        code: with which the process leaves, other than 0; 2 where 1 says something else.

    Raises:
        SystemExit: with the code, after the sentence is written.
    """
    try:
        yield
    except Exception as error:
        if not can_be_mended(error):
            raise
        if os.environ.get(TRACEBACK):
            traceback.print_exc()
        sys.stdout.flush()  # what the command said before stands before
        print(f"error: {sentence(error)}", file=sys.stderr, flush=True)
        raise SystemExit(code) from None


def can_be_mended(error: BaseException) -> bool:
    """Whether a user can mend an error, so that its text says more than its traceback."""
    if isinstance(error, KeyError):  # a sentence of a registry, not the key of some dict
        return " " in sentence(error)
    if isinstance(error, AssertionError):
        return _module(error).startswith(_CONFIG_READERS)
    if isinstance(error, ImportError):  # one that says what to install; Python's has a name
        return error.name is None
    return isinstance(error, (ValueError, *_ALWAYS))


def sentence(error: BaseException) -> str:
    """What an error says, as a user should read it; of several paragraphs, all.

    A ValueError of another library often speaks of none of the user's words, so the line that
    raised it is named.
    """
    # A KeyError's own text is in quotation marks.
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    if not text.strip():
        text = type(error).__name__
    if isinstance(error, ValueError) and not isinstance(error, _ALWAYS):
        module = _module(error)
        if module and not module.startswith((__package__, "__main__", *_CONFIG_READERS)):
            frame = traceback.extract_tb(error.__traceback__)[-1]
            text += f" ({module}, line {frame.lineno}; {TRACEBACK}=1 shows the traceback)"
    return text


def _module(error: BaseException) -> str:
    """The module that raised an error, "" if none did."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return frames[-1].f_globals.get("__name__", "") if frames else ""
