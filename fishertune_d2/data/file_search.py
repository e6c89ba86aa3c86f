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
        for stem, path in _walk(folder, suffixes):
            ending = len(path) - len(os.path.join(folder, stem))
            if any(len(s) > ending and path.lower().endswith(s.lower()) for s in excluded):
                continue
            if keep is not None and not keep(stem):
                continue
            if stem in found:
                raise DatasetError(
                    f"{found[stem]} and {path} are the same image twice; remove one."
                )
            found[stem] = path
    return found


def _walk(folder: str, suffixes: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yields the path below ``folder`` without suffix, and the whole path, of each file."""
    endings = [suffix.lower() for suffix in suffixes]
    for parent, names in _tree(folder):
        below = os.path.relpath(parent, folder).replace(os.sep, "/")
        prefix = "" if below == "." else f"{below}/"
        for name in names:
            suffix = next((s for s in endings if name.lower().endswith(s)), None)
            if suffix is None or name.startswith("."):  # macOS keeps notes on x.png in ._x.png
                continue
            if name.endswith(_CONVERTED) and not suffix.endswith(_CONVERTED.lower()):
                continue
            yield prefix + name[: -len(suffix)], os.path.join(parent, name)


def _tree(folder: str) -> Iterator[tuple[str, list[str]]]:
    """Yields ``folder`` and all folders below it, each with the names of its files.

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
        yield parent, sorted(names)


def other_files(where: Sequence[str], suffixes: Sequence[str]) -> str:
    """Counts the files with other endings by ending, with an example of each, as a sentence."""
    counts: Counter[str] = Counter()
    example: dict[str, str] = {}
    for folder in where:
        for _, names in _tree(folder):
            for name in names:
                if not name.lower().endswith(tuple(s.lower() for s in suffixes)):
                    ending = os.path.splitext(name)[1] or "without an ending"
                    counts[ending] += 1
                    example.setdefault(ending, name)
    found = [f"{count} {ending} ({example[ending]})" for ending, count in counts.most_common()]
    return f" Files of other names are there: {first_names(found)}." if found else ""
