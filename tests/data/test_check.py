import os

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fishertune_d2.data.check import check_datasets, pixel_counts
from fishertune_d2.data.dataset_description import SemSegDataset
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.registration import register

NAMES = ["camvid_day_train", "camvid_dusk_dev"]


def test_good_files_are_read_once(camvid_tree, monkeypatch):
    folder = camvid_tree()
    read = []
    original = pixel_counts.read_image
    monkeypatch.setattr(
        pixel_counts, "read_image", lambda path: read.append(path) or original(path)
    )
    check_datasets([*NAMES, NAMES[0]], num_classes=19)
    assert len(read) == 3
    check_datasets(NAMES)
    assert len(read) == 3  # nothing changed, so nothing is read
    Image.new("RGB", (16, 12)).save(folder / "train/a.jpg")
    check_datasets(NAMES)
    assert len(read) == 5  # only the data set of the changed file


def test_a_file_that_was_rewritten_with_its_old_size_and_time_is_read_again(camvid_tree):
    label = camvid_tree() / "trainannot/a.png"
    Image.new("L", (16, 12), 3).save(label, compress_level=0)
    check_datasets(NAMES[:1])
    before = os.stat(label)
    Image.new("L", (16, 12), 12).save(label, compress_level=0)
    os.utime(label, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(label).st_size == before.st_size
    with pytest.raises(DatasetError, match=r"a\.png: label 12 is out of range"):
        check_datasets(NAMES[:1])


@pytest.mark.parametrize("how", ["the same", "symlink_to", "hardlink_to"])
def test_an_image_that_is_its_own_label_is_refused(tmp_path, monkeypatch, how):
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    image = tmp_path / "i/a.png"
    image.parent.mkdir()
    Image.new("L", (4, 4)).save(image)
    if how != "the same":
        (tmp_path / "l").mkdir()
        getattr(tmp_path / "l/a.png", how)(image)
    register(
        SemSegDataset(
            name="own_x",
            image_dir="i",
            label_dir="l" if how != "the same" else "i",
            label_map="train_ids",
            domain="x",
            root=lambda: tmp_path,
        )
    )
    try:
        with pytest.raises(DatasetError, match=r"own_x: .*a\.png is both an image and its label"):
            check_datasets(["own_x"])
    finally:
        DatasetCatalog.remove("own_x")
        MetadataCatalog.remove("own_x")


def test_one_error_names_every_problem(camvid_tree):
    folder = camvid_tree(size=(64, 64))  # large enough to cut the pixels and not the header
    ids = np.zeros((64, 64), dtype=np.uint8)
    ids[0, 0] = 12
    Image.fromarray(ids).save(folder / "trainannot/a.png")
    content = (folder / "train/b.jpg").read_bytes()
    (folder / "train/b.jpg").write_bytes(content[:-200])
    (folder / "train/0001TP_c.jpg").unlink()
    for _ in range(2):  # a failure is not noted as passed
        with pytest.raises(DatasetError) as error:
            check_datasets([*NAMES, "gtav_train"])
        text = str(error.value)
        assert "camvid_day_train: 2 bad files" in text
        assert "a.png: label 12 is out of range" in text
        assert "b.jpg: cannot be read" in text
        assert "camvid_dusk_dev: no image found" in text
        assert "gta/labels" in text


def test_a_cache_that_cannot_be_written_does_not_matter(camvid_tree, tmp_path, monkeypatch):
    camvid_tree()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "file"))
    check_datasets(NAMES)


def test_a_model_with_other_classes_is_refused(camvid_tree):
    camvid_tree()
    with pytest.raises(DatasetError, match="has 19 classes, but the model has 3.*NUM_CLASSES"):
        check_datasets(NAMES, num_classes=3)


def test_real_camvid_passes(shared_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(shared_dir / "datasets"))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path))
    check_datasets(["camvid_day_train", "camvid_day_test", "camvid_dusk_test"])
