import numpy as np
import pytest
from PIL import Image

from fishertune_d2.data.check import check_datasets, reading
from fishertune_d2.data.files import DatasetError

NAMES = ["camvid_day_train", "camvid_dusk_dev"]


def test_good_files_are_read_once(camvid_tree, monkeypatch):
    folder = camvid_tree()
    read = []
    original = reading.read_image
    monkeypatch.setattr(reading, "read_image", lambda path: read.append(path) or original(path))
    check_datasets([*NAMES, NAMES[0]], num_classes=19)
    assert len(read) == 3
    check_datasets(NAMES)
    assert len(read) == 3  # nothing changed, so nothing is read
    Image.new("RGB", (16, 12)).save(folder / "train/a.jpg")
    check_datasets(NAMES)
    assert len(read) == 5  # only the data set of the changed file


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
