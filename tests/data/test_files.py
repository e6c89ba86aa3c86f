import numpy as np
import pytest
from PIL import Image

from fishertune_d2.data.files import DatasetError, image_size, read_image, read_label

IDS = np.array([[0, 1, 2], [2, 255, 1]], dtype=np.uint8)


def save_label(path, mode):
    if mode == "P":
        image = Image.fromarray(IDS, "L").convert("P")
        image.putdata(IDS.ravel().tolist())
        image.putpalette([200, 10, 10] * 256)  # every id has the same colour
    elif mode == "L":
        image = Image.fromarray(IDS)
    else:
        image = Image.fromarray(IDS.astype(np.uint16 if mode == "I;16" else np.int32))
    assert image.mode == mode
    image.save(path)


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I"])
def test_labels_are_read_as_ids_in_every_mode(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "I" else "x.png")  # PNG has no 32 bits
    save_label(path, mode)
    labels = read_label(path, "identity_3")
    assert labels.dtype == np.uint8
    assert labels.tolist() == IDS.tolist()


def test_a_label_out_of_range_names_file_value_and_map(tmp_path):
    save_label(tmp_path / "x.png", "L")
    with pytest.raises(DatasetError, match=r"x\.png: label 2 is out of range.*\(2 pixels") as error:
        read_label(tmp_path / "x.png", "identity_2")
    assert "knows 0-1, 255" in str(error.value) and "identity_2" in str(error.value)


def test_a_16_bit_label_above_255_is_out_of_range(tmp_path):
    Image.fromarray(np.full((2, 2), 300, dtype=np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(DatasetError, match="label 300 is out of range"):
        read_label(tmp_path / "x.png", "train_ids")


def test_a_coloured_label_is_refused(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "x.png")
    with pytest.raises(DatasetError, match=r"x\.png: .* mode RGB.*Save the ids"):
        read_label(tmp_path / "x.png", "train_ids")


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
@pytest.mark.parametrize("read", [read_image, lambda path: read_label(path, "train_ids")])
def test_a_truncated_file_is_named_with_the_remedy(tmp_path, suffix, read):
    path = tmp_path / f"x{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 19, (64, 64), dtype=np.uint8)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert image_size(path) == (64, 64)  # the header alone does not show it
    with pytest.raises(DatasetError, match=rf"x\{suffix}: cannot be read.*again"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for read in (image_size, read_image):
        with pytest.raises(DatasetError, match=r"x\.png: cannot be read"):
            read(tmp_path / "x.png")


def test_grey_images_become_three_channels_and_bgr_is_the_reverse(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (4, 5, 3)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png")[0, 0].tolist() == [1, 2, 3]
    assert read_image(tmp_path / "rgb.png", "BGR")[0, 0].tolist() == [3, 2, 1]
