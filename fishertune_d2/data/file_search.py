"""Finds files below folders by the endings of their names."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from glob import escape, glob
from pathlib import Path

from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.files import first_names

# Other tools write such labels beside the labels that the authors ship.
_CONVERTED = "_labelTrainIds.png"


def folders(root: Path, pattern: str) -> list[str]:
    """Returns the existing folders that ``pattern`` names below ``root``."""
    if "*" in pattern:
        candidates = sorted(glob(os.path.join(escape(str(root)), pattern)))
    else:  # no glob: the user's own path may hold brackets
        candidates = [str(root / pattern)]
    return [folder for folder in candidates if os.path.isdir(folder)]


def find_files(
    where: Sequence[str],
    suffixes: Sequence[str],
    keep: Callable[[str], bool] | None = None,
    excluded: Sequence[str] = (),
) -> dict[str, str]:
    """Returns the files in some folders, keyed by their path below the folder without the suffix.

    Args:
        where: Folders; folders inside them are searched too.
        suffixes: Endings of the names, in upper or lower case.
        keep: Picks files by their key.
        excluded: Files that end in one of these are left out, if it is longer than the suffix.

    Raises:
        DatasetError: if two files have the same key, or a folder may not be read.
    """
    found: dict[str, str] = {}
    for folder in where:
        for path in _files(folder):
            suffix = _suffix_of(os.path.basename(path), suffixes, excluded)
            if suffix is None:
                continue
            below = path.removeprefix(folder).lstrip(os.sep)
            stem = below[: -len(suffix)].replace(os.sep, "/")  # its case may be another
            if keep is not None and not keep(stem):
                continue
            if stem in found:
                raise DatasetError(
                    f"{found[stem]} and {path} are the same image twice; remove one."
                )
            found[stem] = path
    return found


def _suffix_of(name: str, suffixes: Sequence[str], excluded: Sequence[str]) -> str | None:
    """Returns the suffix of a file's name; None for files of other tools or of ``excluded``."""
    suffix = next((s for s in suffixes if name.lower().endswith(s.lower())), None)
    if suffix is None or name.startswith("."):  # macOS keeps notes on x.png in ._x.png
        return None
    if name.endswith(_CONVERTED) and not suffix.lower().endswith(_CONVERTED.lower()):
        return None
    longer = (s for s in excluded if len(s) > len(suffix))
    return None if any(name.lower().endswith(s.lower()) for s in longer) else suffix


def _files(folder: str) -> Iterator[str]:
    """Yields the paths of all files in ``folder`` and in folders below it.

    Follows links to folders, except a link to a folder that holds the link, which would never end.
    """

    def refuse(error: OSError) -> None:
        raise DatasetError(f"{error.filename}: cannot be read ({error}). Make it readable.")

    # The real folders on the way to each folder.
    inside: dict[str, tuple[str, ...]] = {folder: (os.path.realpath(folder),)}
    for parent, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        way = inside.pop(parent)
        below[:] = [name for name in below if not name.startswith(".")]  # .ipynb_checkpoints
        for name in list(below):
            path = os.path.join(parent, name)
            real = os.path.realpath(path)
            if os.path.islink(path) and any(f"{step}/".startswith(f"{real}/") for step in way):
                below.remove(name)
            else:
                inside[path] = (*way, real)
        yield from (os.path.join(parent, name) for name in sorted(names))


def other_files(where: Sequence[str], suffixes: Sequence[str]) -> str:
    """Counts the files with other endings by ending, with an example of each, as a sentence."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for folder in where:
        for name in map(os.path.basename, _files(folder)):
            if not name.lower().endswith(tuple(s.lower() for s in suffixes)):
                ending = os.path.splitext(name)[1] or "without an ending"
                counts[ending] += 1
                example.setdefault(ending, name)
    found = [f"{count} {ending} ({example[ending]})" for ending, count in counts.most_common()]
    return f" Files of other names are there: {first_names(found)}." if found else ""
