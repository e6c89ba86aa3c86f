"""Counts operators, waits and uploads, each by the line of code that caused it."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = f"{ROOT / 'fishertune_d2'}/"
# This code only passes calls on, so it is never the cause of a count.
_PASSING_ON = ("/torch/", "/contextlib.py", "/tools/fake_cuda/")


@dataclass
class Counts:
    """Counters whose keys are pairs: the event and its place.

    Attributes:
        operators: operators that start a kernel; a fused or foreach operator counts once.
        waits: waits of the host until the device has finished all its work.
        uploads: copies from the host to the device, whether the host waits for them or not.
    """

    operators: Counter = field(default_factory=Counter)
    waits: Counter = field(default_factory=Counter)
    uploads: Counter = field(default_factory=Counter)

    def copy(self) -> "Counts":
        """Copies the present counts."""
        return Counts(*(Counter(each) for each in vars(self).values()))

    def since(self, before: "Counts") -> "Counts":
        """Returns the counts since ``before``."""
        return Counts(*(now - then for now, then in self._beside(before)))

    def _beside(self, other: "Counts") -> Iterator[tuple[Counter, Counter]]:
        return zip(vars(self).values(), vars(other).values(), strict=True)

    def by_name(self, kind: str) -> Counter:
        """Sums a counter over places."""
        names = Counter()
        for (name, _), number in getattr(self, kind).items():
            names[name] += number
        return names


COUNTS = Counts()


@contextmanager
def counting() -> Iterator[Counts]:
    """Yields counts, which are those of the block as soon as it has ended."""
    before, found = COUNTS.copy(), Counts()
    yield found
    vars(found).update(vars(COUNTS.since(before)))


def place() -> str:
    """Returns the place in the code that called the running operator.

    It is the innermost line of the package. If this line called a library, the line of the library
    comes first: ``timm/layers/mlp.py:47 < fishertune_d2/modeling/vfm.py:210``. A backward pass has
    no line, because it runs in a thread of its own.
    """
    frame, inner = sys._getframe(1), ""
    while frame is not None:
        name, own = _known(frame.f_code.co_filename)
        if name:
            here = f"{name}:{frame.f_lineno}"
            if own:
                return f"{inner} < {here}" if inner else here
            inner = inner or here
        frame = frame.f_back
    return inner or "the backward pass"


@cache
def _known(file: str) -> tuple[str, bool]:
    """Returns a file's short name (empty if it only passes calls on), and whether it is ours."""
    if any(part in file for part in _PASSING_ON):
        return "", False
    short = file.rpartition("site-packages/")[2].removeprefix(f"{ROOT}/")
    return short, file.startswith(_PACKAGE)
