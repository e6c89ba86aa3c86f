"""Images and labels with an orientation tag are read upright, as Detectron2 reads them."""

import logging
import struct
import zlib
from itertools import pairwise

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2s
from PIL import Image

from fishertune_d2.data import SegmentationMapper
from fishertune_d2.data.dataset_description import SemSegDataset
from fishertune_d2.data.image_files import (
    DatasetError,
    image_header,
    read_image,
    read_label,
)
from fishertune_d2.data.load_pairs import load_pairs

ORIENTATION = 0x0112
XMP = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-'
    'syntax-ns#"><rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" '
    'tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
)


def chunk(kind, content):
    checked = kind + content
    return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))


def tag(value):
    exif = Image.Exif()
    exif[ORIENTATION] = value
    return exif


def png_chunks(content):
    """A PNG's chunks behind its header, as (start, end)."""
    ends = [33]
    while ends[-1] < len(content):
        (length,) = struct.unpack(">I", content[ends[-1] : ends[-1] + 4])
        ends.append(ends[-1] + 12 + length)
    return list(pairwise(ends))


def insert(path, place, *chunks):
    """Puts chunks into a PNG: behind its header (0) or before its last chunk (-1)."""
    content = path.read_bytes()
    at = png_chunks(content)[place][0]
    path.write_bytes(content[:at] + b"".join(chunks) + content[at:])


def exif_chunk(value):
    return chunk(b"eXIf", tag(value).tobytes().removeprefix(b"Exif\0\0"))


# What each tag means, in the words of the EXIF standard: where the stored first row and column are.
UPRIGHT = {
    2: lambda pixels: pixels[:, ::-1],  # top, right
    3: lambda pixels: pixels[::-1, ::-1],  # bottom, right
    4: lambda pixels: pixels[::-1],  # bottom, left
    5: lambda pixels: pixels.swapaxes(0, 1),  # left, top
    6: lambda pixels: pixels.swapaxes(0, 1)[:, ::-1],  # right, top
    7: lambda pixels: pixels.swapaxes(0, 1)[::-1, ::-1],  # right, bottom
    8: lambda pixels: pixels.swapaxes(0, 1)[::-1],  # left, bottom
}


def noise(*shape, below=256):
    return np.random.default_rng(0).integers(0, below, shape, dtype=np.uint8)


@pytest.mark.parametrize("value", range(10))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_an_image_is_read_as_detectron2_reads_it_whatever_its_tag(tmp_path, suffix, value):
    path = tmp_path / f"x.{suffix}"
    Image.fromarray(noise(6, 10, 3)).save(path, exif=tag(value))
    read = read_image(path)
    np.testing.assert_array_equal(read, detectron2s(str(path), "RGB"))
    assert image_header(path).size == read.shape[:2] == ((10, 6) if 5 <= value <= 8 else (6, 10))
    assert image_header(path).orientation == (value if 1 <= value <= 8 else 1)


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("channels", [1, 3])
def test_a_tiff_is_upright_too(tmp_path, compression, channels, value):
    """Detectron2 turns it twice; Pillow, given a path, garbles grey pixels without compression."""
    pixels, path = noise(6, 10, channels), tmp_path / "x.tif"
    Image.fromarray(pixels.squeeze()).save(path, exif=tag(value), compression=compression)
    read = read_image(path)
    expected = UPRIGHT.get(value, lambda same: same)(pixels)
    np.testing.assert_array_equal(read, np.broadcast_to(expected, read.shape))
    assert image_header(path).size == read.shape[:2]


@pytest.mark.parametrize("value", range(1, 9))
@pytest.mark.parametrize(
    ("suffix", "dtype"), [("png", "u1"), ("png", "u2"), ("tif", "u1"), ("tif", "u2")]
)
def test_a_label_is_turned_as_its_image_is(tmp_path, suffix, dtype, value):
    ids = noise(6, 10, below=19)
    Image.fromarray(ids.astype(dtype)).save(tmp_path / f"label.{suffix}", exif=tag(value))
    label = read_label(tmp_path / f"label.{suffix}", "train_ids")
    np.testing.assert_array_equal(label, UPRIGHT.get(value, lambda same: same)(ids))
    halved = read_label(tmp_path / f"label.{suffix}", "train_ids", halve=True)
    np.testing.assert_array_equal(halved, label[1::2, 1::2])


def test_a_label_of_several_channels_is_turned_too(tmp_path):
    pixels = np.zeros((2, 3, 3), np.uint16)
    pixels[:, :, 2] = [[3, 0, 1], [22, 21, 17]]
    cv2.imwrite(str(tmp_path / "x.png"), pixels)
    insert(tmp_path / "x.png", 0, exif_chunk(6))
    assert read_label(tmp_path / "x.png", "synthia").tolist() == [[255, 0], [3, 255], [12, 10]]


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize(
    "chunks",
    [
        [exif_chunk(6)],
        [chunk(b"prIV", b"x" * 70_000), exif_chunk(6)],
        [exif_chunk(6), chunk(b"tEXt", b"Comment\0" + b"x" * 70_000)],
        [chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + XMP.encode())],
    ],
    ids=["eXIf", "behind much else", "before much else", "XMP"],
)
def test_a_pngs_tag_is_found_before_and_behind_its_pixels(tmp_path, place, chunks):
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), noise(300, 400, 3))
    assert len(png_chunks(path.read_bytes())) > 20  # many chunks of pixels
    assert image_header(path).size == (300, 400)
    insert(path, place, *chunks)
    assert image_header(path).size == (400, 300) == read_image(path).shape[:2]


@pytest.mark.parametrize("size", [1, 100, 8192, 10**6])
def test_a_pngs_size_does_not_hang_on_how_its_pixels_are_cut(tmp_path, size):
    """Also where the first chunk is of another length than the others, or one holds them all."""
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in noise(50, 70)))
    cut = [data[:7], *(data[i : i + size] for i in range(7, len(data), size))]
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 70, 50, 8, 0, 0, 0, 0))
    end = exif_chunk(8) + chunk(b"IEND", b"")
    path = tmp_path / "x.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + b"".join(chunk(b"IDAT", c) for c in cut) + end)
    assert image_header(path).size == (70, 50) == read_image(path).shape[:2]


@pytest.mark.parametrize("broken", [b"Exif\0\0", b"Exif\0\0MM\0*\0\0\xff\xff", b"Exif\0\0nonsense"])
def test_broken_metadata_turn_nothing_as_in_detectron2(tmp_path, broken):
    Image.new("RGB", (10, 6)).save(tmp_path / "x.jpg", exif=broken)
    assert (
        image_header(tmp_path / "x.jpg").size == (6, 10) == read_image(tmp_path / "x.jpg").shape[:2]
    )
    assert detectron2s(str(tmp_path / "x.jpg"), "RGB").shape[:2] == (6, 10)


@pytest.fixture
def photos(tmp_path):
    """Registers a folder of two photos and labels; ``value`` is the photos' tag."""

    def make(value, label_size):
        for part in ("i", "l"):
            (tmp_path / part).mkdir()
        for stem in "ab":
            Image.new("RGB", (64, 48)).save(tmp_path / f"i/{stem}.jpg", exif=tag(value))
            Image.new("L", label_size).save(tmp_path / f"l/{stem}.png")
        return SemSegDataset(
            name="photos",
            image_dir="i",
            label_dir="l",
            label_map="identity_2",
            domain="x",
            root=lambda: tmp_path,
        )

    return make


def test_labels_drawn_on_the_stored_pixels_are_refused_with_both_remedies(photos, tmp_path):
    with pytest.raises(DatasetError) as error:
        load_pairs(photos(6, (64, 48)))
    text = str(error.value)
    assert "a.jpg has 48x64 pixels" in text and "a.png 64x48" in text
    assert "a.jpg are stored as 64x48, and an orientation tag turns them into 48x64" in text
    assert "Draw the labels on the upright images" in text
    assert f"exiftool -Orientation= -overwrite_original -r '{tmp_path}/i'" in text

    pair = {"file_name": str(tmp_path / "i/a.jpg"), "sem_seg_file_name": str(tmp_path / "l/a.png")}
    with pytest.raises(DatasetError, match="stored as 64x48, and an orientation tag turns them"):
        SegmentationMapper(True)({**pair, "label_map": "identity_2"})


def test_a_label_with_a_tag_is_named_too(photos, tmp_path):
    dataset = photos(1, (48, 64))
    Image.new("L", (64, 48)).save(tmp_path / "l/b.png", exif=tag(8))
    Image.new("L", (64, 48)).save(tmp_path / "l/a.png")
    with pytest.raises(DatasetError, match=r"b\.png are stored as 64x48, and an orientation tag"):
        load_pairs(dataset)


def test_a_size_that_no_tag_explains_is_not_said_to_come_from_one(photos):
    with pytest.raises(DatasetError, match="download or export the pair again") as error:
        load_pairs(photos(3, (48, 64)))
    assert "orientation tag" not in str(error.value)


def test_turned_images_are_mentioned_once_and_sizes_are_upright(photos, caplog):
    dataset = photos(8, (48, 64))
    with caplog.at_level(logging.WARNING):
        pairs = [load_pairs(dataset) for _ in range(2)][0]
    assert [(pair["height"], pair["width"]) for pair in pairs] == [(64, 48)] * 2
    said = [m for m in caplog.messages if "orientation tag" in m]
    assert len(said) == 1
    assert said[0].startswith("photos: 2 of 2 images have an orientation tag")


def test_images_without_a_tag_are_not_mentioned(photos, caplog):
    load_pairs(photos(1, (64, 48)))
    assert "orientation" not in caplog.text
