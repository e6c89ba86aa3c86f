"""Which files are drawn, and the names of their pictures."""

from pathlib import Path

import pytest

from fishertune_d2.predict import InputError, find_inputs, name_outputs
from fishertune_d2.predict.inputs import IMAGES


def _touch(folder: Path, *names: str) -> None:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_files_folders_and_patterns(tmp_path):
    _touch(tmp_path / "a", "2.PNG", "1.jpg", "drive.mp4", "notes.txt", "._1.jpg")
    _touch(tmp_path / "b", "[1].png", "1.png", "2.png")
    found = find_inputs([f"{tmp_path}/b/[1].png", f"{tmp_path}/a", f"{tmp_path}/b/?.png"])
    assert [str(path.relative_to(tmp_path)) for path in found] == [
        "b/[1].png", "a/1.jpg", "a/2.PNG", "a/drive.mp4", "b/1.png", "b/2.png",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "name, message",
    [
        ("gone.png", "gone.png: there is no such file or folder, and as a pattern it matches none"),
        ("a/*.jpg", "matches none"),
        ("a", r"no image or video in this folder \(.*; its files end in .txt; folders inside"),
        ("a/notes.txt", "neither as an image .* nor as a video"),
    ],
)
def test_inputs_that_lead_nowhere(tmp_path, name, message):
    _touch(tmp_path / "a", "notes.txt")
    with pytest.raises(InputError, match=message):
        find_inputs([f"{tmp_path}/{name}"])


def test_one_input_to_a_file_several_to_a_folder():
    image, video = Path("in/a.jpg"), Path("in/b.mov")
    assert name_outputs([image], "seen.webp") == [Path("seen.webp")]
    assert name_outputs([image], "seen") == [Path("seen/a.png")]
    assert name_outputs([video], "seen.mp4") == [Path("seen.mp4")]
    assert name_outputs([image, video], "seen") == [Path("seen/a.png"), Path("seen/b.mp4")]


@pytest.mark.parametrize(
    "inputs, output, message",
    [
        (["a.png", "b.png"], "seen.png", "one file, for 2 inputs: name a folder"),
        (["a.mp4"], "seen.png", "a.mp4 is written as .mp4"),
        (["a.png"], "seen.mp4", "a.png is written as .bmp"),
        (["in/a.png"], "in", "would replace an input"),
        (["x/a.png", "y/a.png"], "seen", "x/a.png and y/a.png would both go to seen/a.png"),
    ],
)
def test_no_picture_is_lost(inputs, output, message):
    with pytest.raises(InputError, match=message):
        name_outputs([Path(name) for name in inputs], output)


def test_a_second_input_of_one_name_keeps_its_ending():
    inputs = [Path(name) for name in ("a.jpg", "a.png", "a.mp4", "a.avi", "y/a.tif", "a.png.png")]
    names = ["a.png", "a.png.png", "a.mp4", "a.avi.mp4", "a.tif.png", "a.png.png.png"]
    assert name_outputs(inputs, "seen") == [Path("seen") / name for name in names]


def test_what_is_left_out_of_a_folder_is_counted_in_one_line(tmp_path, caplog):
    folder = tmp_path / "a"
    _touch(folder, "1.png", "2.gif", "3.GIF", "4.jp2", "5.avif", "notes", "._6.png")
    (folder / "inside.png").mkdir()
    (folder / "gone.png").symlink_to("nowhere.png")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "linked.jpg").symlink_to("1.png")
    found = find_inputs([str(folder)])
    assert [path.name for path in found] == ["1.png", "linked.jpg"]
    (record,) = caplog.records
    assert record.getMessage() == (
        f"--input {folder}: left out are 1 .avif, 2 .gif, 1 .jp2, 2 broken link(s), "
        f"1 folder(s), 1 without an ending. Images that can be drawn end in {', '.join(IMAGES)}"
    )
    caplog.clear()
    _touch(tmp_path / "b", "1.png", ".hidden")
    find_inputs([str(tmp_path / "b")])
    assert not caplog.records
