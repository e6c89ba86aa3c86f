"""What the numbers in a file become: labels raw, images of 8 bits or refused."""

import struct
import warnings
import zlib

import cv2
import numpy as np
import pytest
from detectron2.data.detection_utils import read_image as detectron2s
from PIL import Image

from fishertune_d2.data.image_files import DatasetError, read_image, read_label


def png(values, bits, palette=b""):
    """A PNG written by hand: grey values, or indices into a palette, of ``bits`` bits each."""

    def chunk(kind, content):
        checked = kind + content
        return struct.pack(">I", len(content)) + checked + struct.pack(">I", zlib.crc32(checked))

    rows = b""
    for row in values:
        packed = "".join(format(value, f"0{bits}b") for value in row)
        packed += "0" * (-len(packed) % 8)
        rows += b"\0" + bytes(int(packed[i : i + 8], 2) for i in range(0, len(packed), 8))
    colour = 3 if palette else 0
    header = struct.pack(">IIBBBBB", len(values[0]), len(values), bits, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + (chunk(b"PLTE", palette) if palette else b"")
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def tiff(values, bits, white=0):
    """A TIFF written by hand: grey values of ``bits`` bits; ``white`` 1 says that 0 is white."""
    packed = b""
    for row in values:
        text = "".join(format(value, f"0{bits}b") for value in row)
        text += "0" * (-len(text) % 8)
        packed += bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    tags = [
        (256, len(values[0])),
        (257, len(values)),
        (258, bits),
        (259, 1),
        (262, 0 if white else 1),
        (273, 8),
        (277, 1),
        (278, len(values)),
        (279, len(packed)),
    ]
    entries = b"".join(struct.pack("<HHII", key, 4, 1, value) for key, value in tags)
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    return struct.pack("<2sHI", b"II", 42, 8 + len(packed)) + packed + directory


def every_value(bits):
    count = 2 ** min(bits, 4)
    return [list(range(count)), list(range(count))[::-1]]


@pytest.mark.parametrize("label_map", ["train_ids", "synthia"])
@pytest.mark.parametrize("kind", ["grey", "palette", "tiff"])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_ids_of_any_number_of_bits_are_read_as_they_are_stored(tmp_path, bits, kind, label_map):
    if kind == "palette" and bits == 16:
        pytest.skip("PNG has no palette of 16 bits")
    ids = every_value(bits)
    if kind == "tiff":
        content = tiff(ids, bits) if bits < 16 else tiff([[v * 256 for v in r] for r in ids], bits)
    else:
        content = png(ids, bits, bytes([9, 99, 199] * 2 ** min(bits, 8)) * (kind == "palette"))
    (tmp_path / "x").write_bytes(content)
    expected = {0: 255, 1: 10, 2: 2, 3: 0}  # SYNTHIA's
    read = read_label(tmp_path / "x", label_map)
    if label_map == "train_ids":
        assert read.tolist() == ids
    else:
        assert read[0, : min(len(ids[0]), 4)].tolist() == list(expected.values())[: len(ids[0])]


def test_ids_that_count_from_white_downwards_are_refused(tmp_path):
    (tmp_path / "x.tif").write_bytes(tiff(every_value(4), 4, white=1))
    with pytest.raises(DatasetError, match=r"x\.tif: this TIFF says that 0 is white.*grey PNG"):
        read_label(tmp_path / "x.tif", "train_ids")


@pytest.mark.parametrize("most", [1, 2, 15, 200, 255, 300, 65535])
@pytest.mark.parametrize("plain", [False, True])
def test_ids_of_a_pgm_are_not_scaled_by_its_largest_value(tmp_path, most, plain):
    ids = [[0, 1, min(most, 18)], [min(most, 7), 0, 1]]
    if plain:
        content = f"P2\n3 2\n{most}\n".encode() + " ".join(map(str, sum(ids, []))).encode()
    else:
        pixels = np.array(ids, dtype="u1" if most < 256 else ">u2")
        content = f"P5\n3 2\n{most}\n".encode() + pixels.tobytes()
    (tmp_path / "x.pgm").write_bytes(content)
    assert read_label(tmp_path / "x.pgm", "train_ids").tolist() == ids


@pytest.mark.parametrize("content", [b"P4\n2 2\n\x40\x80", b"P1\n2 2\n0 1\n1 0\n"])
def test_a_pbm_whose_1_is_black_is_refused(tmp_path, content):
    (tmp_path / "x.pbm").write_bytes(content)
    with pytest.raises(DatasetError, match=r"x\.pbm: in a PBM file 1 is black.*a grey PNG"):
        read_label(tmp_path / "x.pbm", "identity_2")


@pytest.mark.parametrize(
    ("suffix", "options", "label_map"),
    [
        ("tif", {"compression": "jpeg"}, "train_ids"),
        ("tif", {"compression": "tiff_jpeg"}, "synthia"),
        ("jp2", {"irreversible": True, "quality_layers": [20]}, "train_ids"),
        ("jp2", {"quality_layers": [20]}, "train_ids"),  # cut short: nothing in it says so
        ("webp", {}, "synthia"),
    ],
)
def test_files_that_may_be_compressed_with_loss_are_no_labels(tmp_path, suffix, options, label_map):
    mode = "L" if label_map == "train_ids" else "RGB"
    Image.new(mode, (16, 16)).save(tmp_path / f"x.{suffix}", **options)
    with pytest.raises(DatasetError, match=rf"x\.{suffix}: .*does not keep the ids.*as a PNG"):
        read_label(tmp_path / f"x.{suffix}", label_map)


@pytest.mark.parametrize("mode", ["L", "RGB"])
@pytest.mark.parametrize("label_map", ["train_ids", "synthia"])
def test_a_jpeg_is_no_label(tmp_path, mode, label_map):
    """Its ids would change at the edges, mostly into ids of other classes."""
    Image.new(mode, (16, 16)).save(tmp_path / "x.jpg")
    with pytest.raises(DatasetError, match=r"x\.jpg: a JPEG does not keep the ids.*as a PNG"):
        read_label(tmp_path / "x.jpg", label_map)


GREY16 = np.array([[0, 4095], [30000, 65535]], np.uint16)


@pytest.mark.parametrize(
    ("pixels", "suffix", "named"),
    [
        (GREY16, "png", "16-bit grey from 0 to 65535"),
        (GREY16 // 16, "png", "16-bit grey from 0 to 4095"),
        (GREY16, "tif", "16-bit grey"),
        (GREY16.astype(">u2"), "tif", "16-bit grey"),
        (GREY16.astype(np.int32), "tif", "32-bit integers"),
        ((GREY16 / 65535).astype(np.float32), "tif", "floats from 0 to 1"),
    ],
)
def test_grey_values_whose_white_is_unknown_are_refused(tmp_path, pixels, suffix, named):
    """Pillow clips them to 255 (white) or cuts 0..1 down to 0 (black)."""
    Image.fromarray(pixels).save(tmp_path / f"x.{suffix}")
    with pytest.raises(DatasetError, match=rf"x\.{suffix}: its pixels are {named}.*alpha=255 / wh"):
        read_image(tmp_path / f"x.{suffix}")


def test_the_remedy_for_16_bits_works(tmp_path):
    old, new, white = str(tmp_path / "old.png"), str(tmp_path / "new.png"), 65535
    Image.fromarray(GREY16).save(old)
    pixels = cv2.convertScaleAbs(cv2.imread(old, cv2.IMREAD_UNCHANGED), alpha=255 / white)
    cv2.imwrite(new, pixels)
    assert read_image(new)[..., 0].tolist() == [[0, 16], [117, 255]]


def test_of_16_bit_colours_the_upper_8_bits_are_taken(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 65536, (5, 7, 3), dtype=np.uint16)
    cv2.imwrite(str(tmp_path / "x.png"), pixels)
    assert (read_image(tmp_path / "x.png", "BGR") == pixels >> 8).all()


def drawn(mode):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 24, 4), dtype=np.uint8)
    pixels[:8, :, 3] = 0  # the upper half is transparent, and not black
    image = Image.fromarray(pixels)
    if mode == "P with a transparent colour":
        return image.convert("RGB").convert("P"), {"transparency": 3}
    return (image if mode == "RGBA" else image.convert("RGB").convert(mode)), {}


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [
        ("1", "png"),
        ("LA", "png"),
        ("P with a transparent colour", "png"),
        ("RGBA", "png"),
        ("RGBA", "webp"),
        ("CMYK", "jpg"),
        ("YCbCr", "jpg"),
    ],
)
def test_modes_become_rgb_as_in_detectron2(tmp_path, mode, suffix):
    image, options = drawn(mode)
    image.save(tmp_path / f"x.{suffix}", **options)
    read = read_image(tmp_path / f"x.{suffix}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, about transparency
        expected = detectron2s(str(tmp_path / f"x.{suffix}"), "RGB")
    np.testing.assert_array_equal(read, expected)


def test_transparent_pixels_keep_their_colour(tmp_path):
    image, _ = drawn("RGBA")
    image.save(tmp_path / "x.png")
    np.testing.assert_array_equal(read_image(tmp_path / "x.png"), np.asarray(image)[..., :3])


@pytest.mark.parametrize("suffix", ["gif", "webp", "tif", "png"])
def test_of_several_frames_the_first_is_read(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("white", "black")]
    frames[0].save(tmp_path / f"x.{suffix}", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / f"x.{suffix}").min() > 250


def test_too_many_pixels_are_said_to_be_too_many(tmp_path, monkeypatch):
    Image.new("L", (40, 40)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(DatasetError, match=r"x\.png: has too many pixels.*MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "x.png")
