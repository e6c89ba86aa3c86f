"""Finds the images and videos that a person names, and names the pictures of them."""

import logging
from collections import Counter
from collections.abc import Sequence
from glob import glob
from pathlib import Path

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """Inputs that cannot be drawn as they are; the message names the file and the remedy."""


def find_inputs(names: Sequence[str]) -> list[Path]:
    """Returns images and videos in the order of ``names``, within a folder or pattern by name.

    Args:
        names: files, folders (all images and videos in them, not those of subfolders), or patterns
            such as "night/*.png".

    Raises:
        InputError: if a name leads to nothing, or to a file that is neither image nor video.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = _in_folder(path)
        elif path.is_file():
            found = [path]
        else:
            found = sorted(Path(match) for match in glob(name, recursive=True))
            if not found:
                raise InputError(
                    f"--input {name}: there is no such file or folder, and as a pattern it "
                    "matches none"
                )
        files += found
    for file in files:
        if not _is_readable(file):
            raise InputError(
                f"--input {file}: its name ends neither as an image ({', '.join(IMAGES)}) nor as a "
                f"video ({', '.join(VIDEOS)})"
            )
    return files


def name_outputs(inputs: Sequence[Path], output: str | Path) -> list[Path]:
    """Returns the file to write for each input.

    If there is one input and ``output`` has an ending (.mp4 for a video), it is ``output``. Else
    ``output`` is a folder, in which pictures get the inputs' names, as .png or .mp4. If two inputs
    differ only in their endings, the second keeps its own: ``a.jpg.png``.

    Raises:
        InputError: if two pictures would have one name, or one would replace an input.
    """
    output = Path(output)
    owners: dict[Path, Path] = {}
    if output.suffix and not output.is_dir():
        if len(inputs) > 1:
            raise InputError(
                f"--output {output} is one file, for {len(inputs)} inputs: name a folder"
            )
        allowed = (".mp4",) if is_video(inputs[0]) else IMAGES
        if output.suffix.lower() not in allowed:
            raise InputError(
                f"--output {output}: the picture of {inputs[0]} is written as {', '.join(allowed)}"
            )
        owners[output] = inputs[0]
    else:
        for source in inputs:
            ending = ".mp4" if is_video(source) else ".png"
            target = output / f"{source.stem}{ending}"
            if target in owners and owners[target].name != source.name:
                target = output / f"{source.name}{ending}"
            if target in owners:
                raise InputError(
                    f"the pictures of {owners[target]} and {source} would both go to {target}: "
                    "draw them one after the other, to two folders"
                )
            owners[target] = source
    read = {path.resolve() for path in inputs}
    for target in owners:
        if target.resolve() in read:
            raise InputError(f"{target} would replace an input: choose another --output")
    return list(owners)


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name."""
    return path.suffix.lower() in VIDEOS


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGES, *VIDEOS)


def _in_folder(folder: Path) -> list[Path]:
    """Finds the images and videos in a folder, and warns of the other entries."""
    listed = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    found = [path for path in listed if _is_readable(path) and path.is_file()]
    if not found:
        endings = sorted({path.suffix or "nothing" for path in folder.iterdir() if path.is_file()})
        holds = f"its files end in {', '.join(endings)}" if endings else "it holds no file"
        raise InputError(
            f"--input {folder}: there is no image or video in this folder (none ends in "
            f"{', '.join((*IMAGES, *VIDEOS))}; {holds}; folders inside are not searched)"
        )
    others = Counter(_label(path) for path in set(listed).difference(found))
    if others:
        left_out = ", ".join(f"{count} {label}" for label, count in sorted(others.items()))
        logger.warning(
            f"--input {folder}: left out are {left_out}. Images that can be drawn end in "
            f"{', '.join(IMAGES)}"
        )
    return found


def _label(path: Path) -> str:
    """Names the kind of a folder entry: a folder, a broken link, or a file by its ending."""
    if path.is_dir():
        return "folder(s)"
    if not path.exists():
        return "broken link(s)"
    return path.suffix.lower() or "without an ending"
