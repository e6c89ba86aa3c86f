"""Images and videos: which to read, where the pictures of them go, and drawing them."""

import logging
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from glob import glob
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from fishertune_d2.command_line import sentence
from fishertune_d2.data.image_files import read_image

from .pictures import draw_prediction
from .predictor import InputError, Predictor

IMAGES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
VIDEOS = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpg", ".webm")
# A video of which a smaller share of the frames can be read gets a warning: headers only guess.
_SHORT = 0.9

logger = logging.getLogger(__name__)


def find_inputs(names: Sequence[str]) -> list[Path]:
    """Finds the images and videos that a person names.

    Args:
        names: files, folders (of which all images and videos are taken, not those in folders
            inside), or patterns such as "night/*.png".

    Returns:
        Files in the order given, within a folder or pattern by name.

    Raises:
        InputError: if a name leads to nothing, or to a file that is neither.
    """
    files: list[Path] = []
    for name in names:
        path = Path(name)
        if path.is_dir():
            found = sorted(p for p in _listed(path) if _is_readable(p) and p.is_file())
            if not found:
                raise InputError(
                    f"--input {name}: there is no image or video in this folder (none ends in "
                    f"{', '.join((*IMAGES, *VIDEOS))}; {_endings(path)}; folders inside are not "
                    "searched)"
                )
            _warn_of_others(path, found)
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
                f"--input {file}: by its name neither an image ({', '.join(IMAGES)}) nor a video "
                f"({', '.join(VIDEOS)})"
            )
    return files


def name_outputs(inputs: Sequence[Path], output: str | Path) -> list[Path]:
    """Says where the picture of each input goes.

    Args:
        inputs: images and videos.
        output: the file to write, if there is one input and this has an ending (.mp4 of a video);
            else a folder, in which pictures get the inputs' names, as .png or .mp4. Where two
            inputs differ in their endings alone, the second keeps its own: ``a.jpg.png``.

    Raises:
        InputError: if two pictures would go to one file, or one to an input's place.
    """
    output = Path(output)
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
        targets = [output]
    else:
        targets = _names_in(output, inputs)
    owners: dict[Path, Path] = {}
    read = {path.resolve() for path in inputs}
    for source, target in zip(inputs, targets, strict=True):
        if target.resolve() in read:
            raise InputError(f"{target} would replace an input: choose another --output")
        if target in owners:
            raise InputError(
                f"the pictures of {owners[target]} and {source} would both go to {target}: draw "
                "them one after the other, to two folders"
            )
        owners[target] = source
    return targets


def _names_in(folder: Path, inputs: Sequence[Path]) -> list[Path]:
    """The files in a folder for the pictures of inputs."""
    targets: dict[Path, Path] = {}
    names = []
    for path in inputs:
        ending = ".mp4" if is_video(path) else ".png"
        target = folder / f"{path.stem}{ending}"
        if target in targets and targets[target].name != path.name:
            target = folder / f"{path.name}{ending}"
        targets.setdefault(target, path)
        names.append(target)
    return names


def is_video(path: Path) -> bool:
    """Whether a file is a video by its name."""
    return path.suffix.lower() in VIDEOS


def draw_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    targets: Sequence[Path],
    *,
    confidence: bool = False,
) -> None:
    """Draws files one after the other; one that cannot be drawn does not stop the others.

    Args:
        predictor: the model.
        inputs: images and videos.
        targets: the file to write for each, see :func:`name_outputs`.
        confidence: see :func:`draw_prediction`.

    Raises:
        DatasetError: as InputError, of a single image.
        InputError: if some files could not be drawn, when all others are; each has a line of its
            own on stderr by then. Of a single one, that file's own error.
        OSError: if the picture of a single one cannot be written.
        RuntimeError: of the model, on a single one.
    """
    single, failed = len(inputs) == 1, []
    pairs = list(zip(inputs, targets, strict=True))
    for source, target in tqdm(pairs, unit="file", disable=single):
        try:
            draw_file(predictor, source, target, confidence=confidence)
        # Of one image; the network and OpenCV have no errors of their own for it.
        except (OSError, RuntimeError, ValueError, cv2.error) as error:
            if single:
                raise
            failed.append(source)
            text = sentence(error)
            named = text if str(source) in text else f"{source}: {text}"
            tqdm.write(f"error: {named}", file=sys.stderr)
        else:
            logger.info("%s -> %s", source, target)
    if failed:
        names = ", ".join(path.name for path in failed[:5])
        raise InputError(
            f"{len(failed)} of {len(inputs)} files could not be drawn, as said above: {names}"
            f"{', ...' if len(failed) > 5 else ''}"
        )


def draw_file(
    predictor: Predictor, source: Path, target: Path, *, confidence: bool = False
) -> None:
    """Predicts an image, or a video frame by frame, and writes the picture.

    Below an image stand the names of the classes that occur in it, below a video those of all
    classes, so that its frames are of one size and the names stay where they are.

    Args:
        predictor: the model.
        source: an image or a video.
        target: the file to write; its folder is made.
        confidence: see :func:`draw_prediction`.

    Raises:
        DatasetError: if the image cannot be read.
        InputError: if the video cannot be read or written, or the memory is not enough.
    """
    every_class = range(len(predictor.space.classes)) if is_video(source) else None

    def draw(image: np.ndarray) -> np.ndarray:
        return draw_prediction(
            image, predictor(image), predictor.space, confidence=confidence, legend=every_class
        )

    target.parent.mkdir(parents=True, exist_ok=True)
    if is_video(source):
        _draw_video(source, target, draw)
    else:
        Image.fromarray(draw(read_image(source))).save(target)


def _draw_video(source: Path, target: Path, draw: Callable[[np.ndarray], np.ndarray]) -> None:
    """Draws each frame, at the source's rate; sound is left out."""
    video = cv2.VideoCapture(str(source))
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0  # some files do not say
    frames = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)  # a guess of the file's header
    writer, done = None, 0
    try:
        with tqdm(total=frames or None, desc=source.name, unit="frame", leave=None) as progress:
            while True:
                read, frame = video.read()
                if not read:
                    break
                picture = _even(draw(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)))
                if writer is None:
                    size = picture.shape[1::-1]
                    writer = cv2.VideoWriter(
                        str(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, size
                    )
                    if not writer.isOpened():
                        raise InputError(
                            f"{target} cannot be written as a video of {size[0]} x {size[1]}: is "
                            "there room, and may you write there?"
                        )
                writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
                done += 1
                progress.update()
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if not done:
        raise InputError(
            f"{source}: OpenCV reads no frame of it. Copy it again, or convert it first: "
            f"ffmpeg -i {source.name} -pix_fmt yuv420p converted.mp4"
        )
    if done < _SHORT * frames:
        logger.warning(
            "%s says that it has %d frames, and %d could be read: is it damaged, or not wholly "
            "copied?",
            source,
            frames,
            done,
        )


def _even(picture: np.ndarray) -> np.ndarray:
    """Adds a white row or column where the size is odd: MPEG-4 codes colours in pairs of pixels."""
    height, width = picture.shape[:2]
    if height % 2 == width % 2 == 0:
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)


def _endings(folder: Path) -> str:
    endings = sorted({file.suffix or "nothing" for file in folder.iterdir() if file.is_file()})
    return f"its files end in {', '.join(endings)}" if endings else "it holds no file"


def _listed(folder: Path) -> list[Path]:
    """What is in a folder, without hidden files."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _warn_of_others(folder: Path, found: Sequence[Path]) -> None:
    """Says in one line what of a folder is not drawn."""
    others = [path for path in _listed(folder) if path not in set(found)]
    broken = [path.name for path in others if path.is_symlink() and not path.exists()]
    folders = [path for path in others if path.is_dir()]
    files = Counter(path.suffix.lower() for path in others if path.is_file())
    parts = [f"{len(folders)} folder{'s' * (len(folders) > 1)}"] if folders else []
    if broken:
        names = f"{broken[0]}{', ...' * (len(broken) > 1)}"
        parts += [f"{len(broken)} broken link{'s' * (len(broken) > 1)} ({names})"]
    # The files without an ending last.
    for ending, count in sorted(files.items(), key=lambda item: (not item[0], item[0])):
        parts += [f"{count} {ending or 'without an ending'}"]
    if parts:
        logger.warning(
            "--input %s: left out are %s. Images that can be drawn end in %s",
            folder,
            ", ".join(parts),
            ", ".join(IMAGES),
        )


def _is_readable(path: Path) -> bool:
    return path.suffix.lower() in (*IMAGES, *VIDEOS)
