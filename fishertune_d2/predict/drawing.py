"""Draws the predictions of images and videos into files."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from fishertune_d2.command_line import sentence
from fishertune_d2.data.image_files import read_image
from fishertune_d2.files import first_names

from .inputs import InputError, is_video
from .overlay import draw_prediction
from .predictor import Predictor

# If OpenCV reads a smaller share of a video's frames, a warning follows; headers are only guesses.
_SHORT = 0.9

logger = logging.getLogger(__name__)


def draw_files(
    predictor: Predictor,
    inputs: Sequence[Path],
    targets: Sequence[Path],
    *,
    confidence: bool = False,
) -> None:
    """Draws files one after the other; an error in one does not stop the others.

    For several files, each error is a line on stderr. The error of a single file is raised.

    ``targets`` are the files to write, see :func:`name_outputs`; for ``confidence`` see
    :func:`draw_prediction`.

    Raises:
        InputError: after the last file, if some of several could not be drawn.
    """
    if len(inputs) == 1:
        draw_file(predictor, inputs[0], targets[0], confidence=confidence)
        logger.info("%s -> %s", inputs[0], targets[0])
        return
    failed: list[Path] = []
    for source, target in tqdm(list(zip(inputs, targets, strict=True)), unit="file"):
        try:
            draw_file(predictor, source, target, confidence=confidence)
        # The errors of one image; the network and OpenCV have no type of their own for them.
        except (OSError, RuntimeError, ValueError, cv2.error) as error:
            failed.append(source)
            text = sentence(error)
            named = text if str(source) in text else f"{source}: {text}"
            tqdm.write(f"error: {named}", file=sys.stderr)
        else:
            logger.info("%s -> %s", source, target)
    if failed:
        raise InputError(
            f"{len(failed)} of {len(inputs)} files could not be drawn (see the errors above): "
            f"{first_names([path.name for path in failed])}"
        )


def draw_file(
    predictor: Predictor, source: Path, target: Path, *, confidence: bool = False
) -> None:
    """Predicts an image, or a video frame by frame, and writes the picture; makes its folder.

    The legend of an image names the classes in it. The legend of a video names all classes, so that
    its frames have one size and the names do not move.
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
    """Draws each frame, at the source's rate and without sound."""
    video = cv2.VideoCapture(str(source))
    rate = video.get(cv2.CAP_PROP_FPS) or 25.0  # some files do not say
    frames = max(int(video.get(cv2.CAP_PROP_FRAME_COUNT)), 0)  # a guess of the file's header
    writer, done = None, 0
    try:
        for frame in tqdm(_frames(video), source.name, frames or None, unit="frame", leave=None):
            picture = _even(draw(frame))
            if writer is None:
                writer = _open_writer(target, rate, picture)
            writer.write(cv2.cvtColor(picture, cv2.COLOR_RGB2BGR))
            done += 1
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
            f"{source} says that it has {frames} frames, and {done} could be read: is it damaged, "
            "or not copied to its end?"
        )


def _frames(video: cv2.VideoCapture) -> Iterator[np.ndarray]:
    """Yields the frames of a video, (H, W, 3) uint8 RGB."""
    while True:
        read, frame = video.read()
        if not read:
            return
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB)


def _open_writer(target: Path, rate: float, picture: np.ndarray) -> cv2.VideoWriter:
    """Opens a video for pictures of one size."""
    height, width = picture.shape[:2]
    writer = cv2.VideoWriter(str(target), cv2.VideoWriter.fourcc(*"mp4v"), rate, (width, height))
    if not writer.isOpened():
        raise InputError(
            f"{target} cannot be written as a video of {width} x {height}: is "
            "there room, and may you write there?"
        )
    return writer


def _even(picture: np.ndarray) -> np.ndarray:
    """Pads an odd side with white, because MPEG-4 stores colours for pairs of pixels."""
    height, width = picture.shape[:2]
    if height % 2 == width % 2 == 0:
        return picture
    return np.pad(picture, ((0, height % 2), (0, width % 2), (0, 0)), constant_values=255)
