import cv2
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fishertune_d2.data.image_files import DatasetError, image_header, read_image, read_label
from fishertune_d2.data.labels import LABEL_MAPS, UNKNOWN_ID

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
    assert image_header(path).size == (64, 64)  # the header alone does not show it
    with pytest.raises(DatasetError, match=rf"x\{suffix}: cannot be read.*again"):
        read(path)


@pytest.mark.parametrize("content", [b"", b"not an image"])
def test_a_file_that_is_no_image_is_named(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    for read in (image_header, read_image):
        with pytest.raises(DatasetError, match=r"x\.png: cannot be read"):
            read(tmp_path / "x.png")


def test_grey_images_become_three_channels_and_bgr_is_the_reverse(tmp_path):
    Image.new("L", (5, 4), 7).save(tmp_path / "grey.png")
    assert read_image(tmp_path / "grey.png").shape == (4, 5, 3)
    Image.new("RGB", (5, 4), (1, 2, 3)).save(tmp_path / "rgb.png")
    assert read_image(tmp_path / "rgb.png")[0, 0].tolist() == [1, 2, 3]
    assert read_image(tmp_path / "rgb.png", "BGR")[0, 0].tolist() == [3, 2, 1]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P"])
def test_png_images_are_decoded_as_opencv_decodes_them(tmp_path, mode):
    pixels = np.random.default_rng(0).integers(0, 256, (37, 53, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert("RGB").convert(mode).save(tmp_path / "x.png")
    read = read_image(tmp_path / "x.png", "BGR")
    np.testing.assert_array_equal(read, cv2.imread(str(tmp_path / "x.png"), cv2.IMREAD_COLOR))


@pytest.mark.parametrize("label_map", ["train_ids", "label_ids", "camvid", "mapillary_v1.2_hrda"])
def test_every_known_id_is_read_as_its_map_says(tmp_path, label_map):
    table = LABEL_MAPS[label_map]
    ids = np.flatnonzero(table != UNKNOWN_ID).astype(np.uint8)[None]
    Image.fromarray(ids).save(tmp_path / "x.png")
    assert read_label(tmp_path / "x.png", label_map).tolist() == table[ids].tolist()


def save_synthia(path, ids, instances=300, dtype=np.uint16):
    """A label as SYNTHIA ships it: class, instance and nothing in 16-bit red, green and blue."""
    pixels = np.zeros((*ids.shape, 3), dtype)
    pixels[:, :, 2], pixels[:, :, 1] = ids, instances
    cv2.imwrite(str(path), pixels)


def test_synthias_class_is_in_the_first_of_its_channels(tmp_path):
    ids = np.array([[3, 0, 1], [22, 21, 17]])
    save_synthia(tmp_path / "x.png", ids)
    pillow = np.asarray(Image.open(tmp_path / "x.png"))
    assert (pillow[:, :, 0] == 0).all()  # why OpenCV reads it
    assert read_label(tmp_path / "x.png", "synthia").tolist() == [[0, 255, 10], [255, 3, 12]]


def test_synthias_classes_saved_alone_are_read_too(tmp_path):
    Image.fromarray(np.array([[3, 0, 8]], dtype=np.uint8)).save(tmp_path / "x.png")
    assert read_label(tmp_path / "x.png", "synthia").tolist() == [[0, 255, 13]]


def test_a_synthia_label_out_of_range_is_named(tmp_path):
    save_synthia(tmp_path / "x.png", np.array([[3, 23]]))
    with pytest.raises(DatasetError, match=r"label 23 is out of range.*'synthia' knows 0-22\."):
        read_label(tmp_path / "x.png", "synthia")


def test_a_truncated_synthia_label_is_named(tmp_path):
    path = tmp_path / "x.png"
    save_synthia(path, np.random.default_rng(0).integers(0, 23, (64, 64)))
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=r"x\.png: cannot be read.*again"):
        read_label(path, "synthia")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(height=st.integers(2, 40), width=st.integers(2, 40))
def test_halving_takes_the_pixels_that_pillow_takes(tmp_path, height, width):
    ids = np.random.default_rng(height * 41 + width).integers(0, 19, (height, width))
    image = Image.fromarray(ids.astype(np.uint8))
    image.save(tmp_path / "x.png")
    halved = image.resize((width // 2, height // 2), Image.Resampling.NEAREST)
    label = read_label(tmp_path / "x.png", "train_ids", halve=True)
    assert label.tolist() == np.asarray(halved).tolist()


@pytest.mark.parametrize(
    ("suffix", "mode"),
    [(".png", "L"), (".png", "P"), (".png", "RGB"), (".jpg", "L"), (".jpg", "RGB"), (".tif", "L")],
)
def test_the_size_is_read_from_any_header(tmp_path, suffix, mode):
    Image.new(mode, (700, 3)).save(tmp_path / f"x{suffix}")
    assert image_header(tmp_path / f"x{suffix}").size == (3, 700)


def test_a_png_that_ends_within_its_header_is_named(tmp_path):
    Image.new("L", (7, 3)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes((tmp_path / "x.png").read_bytes()[:22])
    with pytest.raises(DatasetError, match=r"x\.png: cannot be read"):
        image_header(tmp_path / "x.png")
