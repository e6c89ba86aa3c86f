"""The held-out parts of the sources: disjoint from the training part, and shifted as named."""

import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from fishertune_d2.data.held_out import DEV_SHIFTS
from fishertune_d2.data.image_shifts import shift_image
from fishertune_d2.data.mapper import SegmentationMapper

FILES = {
    "gtav": [("gta/images/%s.png", "gta/labels/%s.png", f"{k:05d}") for k in (1, 24_466, 24_467)],
    "cityscapes": [
        (
            "cityscapes/leftImg8bit/train/%s_leftImg8bit.png",
            "cityscapes/gtFine/train/%s_gtFine_labelIds.png",
            stem,
        )
        for stem in ("aachen/aachen_0", "ulmen/ulmen_0", "zurich/zurich_0")
    ],
}
HELD = {"gtav": "24467", "cityscapes": "zurich/zurich_0"}


@pytest.fixture(params=FILES)
def source(request, tmp_path, monkeypatch) -> str:
    """A source of three images under $DETECTRON2_DATASETS, one of them held out."""
    rng = np.random.default_rng(0)
    for image, label, stem in FILES[request.param]:
        for pattern, shape in ((image, (32, 64, 3)), (label, (32, 64))):
            file = tmp_path / (pattern % stem)
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(7, 30, shape, np.uint8)).save(file)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    return request.param


def _stems(name: str) -> list[str]:
    return [pair["image_id"] for pair in DatasetCatalog.get(name)]


def test_each_image_is_either_trained_on_or_held_out(source):
    train, dev = _stems(f"{source}_search_train"), _stems(f"{source}_search_dev")
    assert dev == [HELD[source]]
    assert sorted(train + dev) == _stems(f"{source}_train")


def test_the_shifted_parts_hold_the_same_files_in_other_domains(source):
    plain = DatasetCatalog.get(f"{source}_search_dev")
    assert "shift" not in plain[0]
    for shift in DEV_SHIFTS:
        shifted = DatasetCatalog.get(f"{source}_search_dev_{shift}")
        assert [each["file_name"] for each in shifted] == [each["file_name"] for each in plain]
        assert {each["shift"] for each in shifted} == {shift}


def test_the_mapper_shifts_the_image_and_not_the_label(source):
    mapper = SegmentationMapper(is_train=False)
    (plain,) = DatasetCatalog.get(f"{source}_search_dev")
    (foggy,) = DatasetCatalog.get(f"{source}_search_dev_fog")
    one, other = mapper({**plain, "test_size": None}), mapper({**foggy, "test_size": None})
    rgb = np.asarray(Image.open(plain["file_name"]))
    expected = shift_image(rgb, "fog", plain["file_name"])
    assert (one["image"].numpy().transpose(1, 2, 0) == rgb).all()
    assert (other["image"].numpy().transpose(1, 2, 0) == expected).all()
    assert one["sem_seg_file_name"] == other["sem_seg_file_name"]
