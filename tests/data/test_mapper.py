import random

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from PIL import Image

from fishertune_d2.config import add_fishertune_config
from fishertune_d2.data.labels import LABEL_MAPS
from fishertune_d2.data.mapper import SegmentationMapper


def make_cfg(**overrides):
    cfg = get_cfg()
    add_fishertune_config(cfg)
    cfg.INPUT.MIN_SIZE_TRAIN = [40]
    cfg.INPUT.CROP.SIZE = [24, 32]
    cfg.INPUT.COLOR_AUG_SSD = False
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.merge_from_list([x for pair in overrides.items() for x in pair])
    return cfg


def make_item(folder, image, ids, **more):
    Image.fromarray(image).save(folder / "image.png")
    Image.fromarray(ids).save(folder / "label.png")
    return {
        "file_name": str(folder / "image.png"),
        "sem_seg_file_name": str(folder / "label.png"),
        "height": ids.shape[0],
        "width": ids.shape[1],
        "image_id": "image",
        "label_map": "camvid",
        **more,
    }


@pytest.fixture
def item(tmp_path):
    """Labels in stripes; the image's three channels repeat the train id, so both must move alike.

    The stripes are 8 pixels wide and twice as wide after the resize to a short edge of 40.
    """
    ids = np.repeat(np.arange(4, dtype=np.uint8), 8)[None].repeat(20, axis=0)
    image = np.repeat(LABEL_MAPS["camvid"][ids][..., None].astype(np.uint8) * 10, 3, axis=2)
    return make_item(tmp_path, image, ids)


def run(mapper, item, seed=0):
    np.random.seed(seed)
    random.seed(seed)
    return mapper(item)


def test_training_gives_crops_of_train_ids(item):
    mapper = SegmentationMapper(make_cfg(), is_train=True)
    out = run(mapper, item)
    assert out["image"].shape == (3, 24, 32) and out["image"].dtype == torch.uint8
    assert out["sem_seg"].shape == (24, 32) and out["sem_seg"].dtype == torch.int64
    assert set(out["sem_seg"].unique().tolist()) <= {10, 2, 5, 0}
    assert "image" not in item  # the data set's own dict is left as it was


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_image_and_label_move_together(item, flip):
    mapper = SegmentationMapper(make_cfg(**{"INPUT.RANDOM_FLIP": flip}), is_train=True)
    for seed in range(8):
        out = run(mapper, item, seed)
        difference = (out["image"][0].int() - 10 * out["sem_seg"]).abs()
        assert (difference == 0).float().mean() > 0.8  # bilinear edges between stripes differ


def test_flip_happens_in_training(item):
    plain = SegmentationMapper(make_cfg(**{"INPUT.CROP.ENABLED": False}), is_train=True)
    cfg = make_cfg(**{"INPUT.RANDOM_FLIP": "horizontal", "INPUT.CROP.ENABLED": False})
    flipping = SegmentationMapper(cfg, is_train=True)
    expected = run(plain, item)["sem_seg"]
    flipped = [run(flipping, item, seed)["sem_seg"] for seed in range(16)]
    assert any(torch.equal(x, expected.flip(1)) for x in flipped)
    assert any(torch.equal(x, expected) for x in flipped)


def test_small_images_are_padded_to_the_crop(item):
    cfg = make_cfg(**{"INPUT.CROP.SIZE": [50, 90]})
    out = run(SegmentationMapper(cfg, is_train=True), item)
    assert out["image"].shape == (3, 50, 90) and out["sem_seg"].shape == (50, 90)
    padding = torch.ones(50, 90, dtype=torch.bool)
    padding[:40, :64] = False
    assert (out["sem_seg"][padding] == 255).all()
    assert (out["sem_seg"][~padding] != 255).all()
    assert (out["image"][:, padding] == torch.tensor([[124], [116], [104]])).all()


def test_jitter_changes_the_image_only_and_only_in_training(item):
    cfg = make_cfg(**{"INPUT.COLOR_AUG_SSD": True})
    plain, jitter = SegmentationMapper(make_cfg(), True), SegmentationMapper(cfg, True)
    changed = 0
    for seed in range(8):
        a, b = run(plain, item, seed), run(jitter, item, seed)
        assert torch.equal(a["sem_seg"], b["sem_seg"])
        changed += not torch.equal(a["image"], b["image"])
    assert changed >= 4

    test_mapper = SegmentationMapper(cfg, is_train=False)
    stored = torch.from_numpy(np.array(Image.open(item["file_name"]))).permute(2, 0, 1)
    for seed in range(4):
        assert torch.equal(run(test_mapper, item, seed)["image"], stored)


def test_crops_avoid_one_class_filling_them(tmp_path):
    ids = np.full((40, 200), 3, dtype=np.uint8)
    ids[:, 100:] = np.arange(100) // 10 % 2  # stripes of two classes in the right half
    item = make_item(tmp_path, np.zeros((40, 200, 3), np.uint8), ids)

    def share_of_full_crops(limit):
        cfg = make_cfg(
            **{"INPUT.CROP.SIZE": [20, 20], "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": limit}
        )
        mapper = SegmentationMapper(cfg, is_train=True)
        labels = [run(mapper, item, seed)["sem_seg"] for seed in range(40)]
        return np.mean([x.flatten().bincount().max() > 0.75 * x.numel() for x in labels])

    assert share_of_full_crops(1.0) > 0.3
    assert share_of_full_crops(0.75) == 0


def test_short_edges_are_chosen_from_the_list(item):
    cfg = make_cfg(**{"INPUT.MIN_SIZE_TRAIN": [20, 30, 40], "INPUT.CROP.ENABLED": False})
    mapper = SegmentationMapper(cfg, is_train=True)
    heights = {run(mapper, item, seed)["image"].shape[1] for seed in range(30)}
    assert heights == {20, 30, 40}


@pytest.mark.parametrize(
    ("test_size", "shape"),
    [(None, (3, 20, 32)), ((16, 10), (3, 10, 16)), ((64, 10), (3, 10, 16)), ((8, 8), (3, 5, 8))],
)
def test_at_test_time_the_image_is_fitted_and_the_label_left_alone(item, test_size, shape):
    mapper = SegmentationMapper(make_cfg(), is_train=False)
    out = mapper({**item, "test_size": test_size})
    assert out["image"].shape == shape
    assert (out["height"], out["width"]) == (20, 32)
    assert "sem_seg" not in out


def test_crops_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match="INPUT.CROP.TYPE is 'relative_range'"):
        SegmentationMapper(make_cfg(**{"INPUT.CROP.TYPE": "relative_range"}), is_train=True)
