"""Pictures of images and videos, and the command that draws them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.data import DatasetError
from fishertune_d2.predict import (
    InputError,
    Predictor,
    draw_file,
    draw_files,
    name_outputs,
    read_run,
)

ROOT = Path(__file__).resolve().parents[2]


def _write_video(path: Path, frames: int, size: tuple[int, int], rate: float = 5.0) -> None:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size)
    for k in range(frames):
        writer.write(np.full((*size[::-1], 3), 40 * k, np.uint8))
    writer.release()


def _read_video(path: Path) -> tuple[list[np.ndarray], float]:
    video, frames = cv2.VideoCapture(str(path)), []
    while True:
        read, frame = video.read()
        if not read:
            return frames, video.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


@pytest.fixture
def predictor(make_run, town) -> Predictor:
    return Predictor(read_run(f"{make_run().OUTPUT_DIR}/config.yaml"))


def test_an_image_lies_as_its_camera_was_held(predictor, image, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    draw_file(predictor, tmp_path / "a.png", tmp_path / "new/seen.png")
    assert Image.open(tmp_path / "new/seen.png").width == 40  # the image is 56 wide as stored


@pytest.mark.parametrize("size", [(64, 48), (63, 47)])
def test_a_video_has_as_many_frames_of_one_size(predictor, tmp_path, size):
    _write_video(tmp_path / "drive.avi", 4, size)
    draw_file(predictor, tmp_path / "drive.avi", tmp_path / "seen.mp4", confidence=True)
    before, after = _read_video(tmp_path / "drive.avi"), _read_video(tmp_path / "seen.mp4")
    assert len(after[0]) == len(before[0]) == 4
    assert after[1] == before[1] == 5.0
    height, width = before[0][0].shape[:2]
    assert {frame.shape[1] for frame in after[0]} == {2 * width}
    assert all(frame.shape[0] > height for frame in after[0])  # the legend
    assert np.abs(after[0][0][:height].astype(int) - after[0][3][:height]).max() > 20


@pytest.mark.parametrize("content", [b"", b"no video"])
def test_a_video_that_cannot_be_read(predictor, tmp_path, content):
    (tmp_path / "drive.mp4").write_bytes(content)
    with pytest.raises(InputError, match="drive.mp4: OpenCV reads no frame of it.*ffmpeg -i"):
        draw_file(predictor, tmp_path / "drive.mp4", tmp_path / "seen.mp4")
    assert not (tmp_path / "seen.mp4").exists()


def test_an_image_that_cannot_be_read(predictor, tmp_path):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="a.png: cannot be read"):
        draw_file(predictor, tmp_path / "a.png", tmp_path / "seen.png")


def test_files_that_cannot_be_read_do_not_stop_the_others(predictor, image, tmp_path, capsys):
    inputs = [tmp_path / name for name in ("a.png", "b.png", "c.mp4", "d.tif", "e.png")]
    for path in (inputs[0], inputs[4]):
        Image.fromarray(image).save(path)
    inputs[1].write_bytes(b"no image")
    inputs[2].write_bytes(b"no video")
    Image.fromarray(np.full((8, 8), np.nan, np.float32)).save(inputs[3])
    targets = name_outputs(inputs, tmp_path / "seen")
    with pytest.raises(InputError, match=r"^3 of 5 files could not be drawn.*: b.png, c.mp4, d.t"):
        draw_files(predictor, inputs, targets)
    assert [path.name for path in sorted((tmp_path / "seen").iterdir())] == ["a.png", "e.png"]
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in said] == [str(path) for path in inputs[1:4]]


@pytest.mark.parametrize("error", [RuntimeError, ValueError])
def test_an_error_of_one_image_does_not_stop_the_others(error, image, tmp_path, capsys):
    def predict(pixels: np.ndarray) -> None:
        raise error("shape of one pixel" if pixels.shape[0] == 1 else "of the rest")

    inputs = [tmp_path / name for name in ("a.png", "b.png")]
    Image.fromarray(image[:1, :1]).save(inputs[0])
    Image.fromarray(image).save(inputs[1])
    predictor = predict
    predict.space = None
    with pytest.raises(InputError, match="^2 of 2 files could not be drawn"):
        draw_files(predictor, inputs, [tmp_path / "x.png", tmp_path / "y.png"])
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert [line.split(": ")[1] for line in said] == [str(path) for path in inputs]
    with pytest.raises(error, match="shape of one pixel"):
        draw_files(predictor, inputs[:1], [tmp_path / "x.png"])


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_an_image_of_one_pixel_warns_of_nothing(predictor, image, monkeypatch):
    predictor.size = None
    scores = [{"sem_seg": torch.rand(3, 1, 1)}]  # the tiny head's norms need two cells
    monkeypatch.setattr(predictor.model, "forward", lambda inputs: scores)
    torch.set_warn_always(True)  # else torch says it once a process
    try:
        assert predictor(image[:1, :1]).classes.shape == (1, 1)
    finally:
        torch.set_warn_always(False)


def test_a_single_file_that_cannot_be_read_is_said_once(predictor, tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DatasetError, match="a.png: cannot be read"):
        draw_files(predictor, [tmp_path / "a.png"], [tmp_path / "seen.png"])
    assert "error: " not in capsys.readouterr().err


def test_a_video_that_ends_too_early(predictor, tmp_path, monkeypatch, caplog):
    path = tmp_path / "drive.avi"
    _write_video(path, 3, (64, 48))
    draw_file(predictor, path, tmp_path / "seen.mp4")
    assert "could be read" not in caplog.text

    def says_ten(name: str) -> SimpleNamespace:
        video = capture(name)
        counts = {cv2.CAP_PROP_FRAME_COUNT: 10.0}
        get = lambda what: counts.get(what, 5.0)  # noqa: E731
        return SimpleNamespace(get=get, read=video.read, release=video.release)

    capture = cv2.VideoCapture
    monkeypatch.setattr("cv2.VideoCapture", says_ten)
    draw_file(predictor, path, tmp_path / "seen.mp4")
    assert "drive.avi says that it has 10 frames, and 3 could be read" in caplog.text


def test_the_command(make_run, town, tmp_path):
    config = f"{make_run('moved').OUTPUT_DIR}/config.yaml"
    (tmp_path / "in").mkdir()
    Image.fromarray(np.zeros((40, 56, 3), np.uint8)).save(tmp_path / "in/a.jpg")
    _write_video(tmp_path / "drive.mp4", 2, (64, 48))
    run = subprocess.run(
        [
            *(sys.executable, "demo.py", "--config-file", config),
            *("--input", f"{tmp_path}/in", f"{tmp_path}/*.mp4", "--output", f"{tmp_path}/seen"),
            *("--confidence", "--opts", "MODEL.DEVICE", "cpu"),
        ],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    assert Image.open(tmp_path / "seen/a.png").width == 2 * 56
    assert len(_read_video(tmp_path / "seen/drive.mp4")[0]) == 2
    assert "keeps its random" not in run.stdout + run.stderr  # no weight does


def test_the_command_says_what_is_wrong(monkeypatch, capsys):
    # It would change the loggers of the tests to come.
    monkeypatch.setattr("fishertune_d2.predict.__main__.setup_logger", lambda **_: None)
    monkeypatch.setattr("sys.argv", "demo.py --config-file x --input gone --output seen".split())
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "demo.py"), run_name="__main__")
    said = capsys.readouterr().err
    assert left.value.code == 1
    assert said.startswith("error: --input gone: there is no such file or folder")
