import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.projects.point_rend import ColorAugSSDTransform
from PIL import Image

import fishertune_d2.data.registration  # noqa: F401  (registers the names)
from fishertune_d2.config import default_config
from fishertune_d2.data.image_files import DatasetError, read_image, read_label
from fishertune_d2.data.labels import LABEL_MAPS
from fishertune_d2.data.mapper import SegmentationMapper, fit_into


def make_cfg(**overrides):
    cfg = default_config()
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
    assert out["sem_seg"].shape == (24, 32) and out["sem_seg"].dtype == torch.uint8
    assert set(out["sem_seg"].unique().tolist()) <= {10, 2, 5, 0}
    assert "image" not in item  # the data set's own dict is left as it was


@pytest.mark.parametrize("image_format", ["RGB", "BGR"])
@pytest.mark.parametrize(
    ("short_edges", "crop", "limit"),
    [
        ([23, 37, 60, 90], [24, 32], 0.75),  # shrunk, as it is and enlarged
        ([30, 45], [24, 32], 1.0),
        ([30, 45], [48, 48], 0.75),  # crops as high as the image, or higher
        ([0, 30], [24, 32], 0.75),  # 0 is Detectron2's word for the file's size
        ([45], None, 0.75),
    ],
)
def test_training_sees_what_detectron2s_transforms_make(
    tmp_path, short_edges, crop, limit, image_format
):
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (60, 97, 3), dtype=np.uint8)  # the hardest for a bound
    ids = rng.integers(0, 4, (60, 97), dtype=np.uint8)
    ids[:, :60] = 3  # so that crops are drawn again
    item = make_item(tmp_path, noise, ids)
    cfg = make_cfg(
        **{
            "INPUT.FORMAT": image_format,
            "INPUT.MIN_SIZE_TRAIN": short_edges,
            "INPUT.CROP.ENABLED": crop is not None,
            "INPUT.CROP.SIZE": crop or [24, 32],
            "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": limit,
            "INPUT.RANDOM_FLIP": "horizontal",
        }
    )
    transforms = [T.ResizeShortestEdge(short_edges, 2048, "choice")]
    if crop is not None:
        transforms.append(T.RandomCrop_CategoryAreaConstraint("absolute", crop, limit, 255))
    transforms.append(T.RandomFlip())
    mapper, worst = SegmentationMapper(cfg, is_train=True), 0
    for seed in range(40):
        out = run(mapper, item, seed)
        state = np.random.get_state()[1].tolist()
        np.random.seed(seed)
        expected = T.AugInput(
            read_image(item["file_name"], image_format),
            sem_seg=read_label(item["sem_seg_file_name"], "camvid"),
        )
        T.AugmentationList(transforms)(expected)
        assert np.random.get_state()[1].tolist() == state  # the same numbers were drawn
        height, width = expected.sem_seg.shape  # without padding
        np.testing.assert_array_equal(out["sem_seg"][:height, :width], expected.sem_seg)
        image = out["image"][:, :height, :width].permute(1, 2, 0).numpy().astype(int)
        worst = max(worst, np.abs(image - expected.image).max())
    assert worst <= 2  # grey levels


def test_the_benchmark_maps_as_detectron2_and_as_we_to_the_same_labels(item, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from data_loading import Clock, map_as_detectron2, map_as_we

    mapper = SegmentationMapper(make_cfg(**{"INPUT.CROP.SIZE": [48, 32]}), is_train=True)  # padded
    results = []
    for way in (map_as_detectron2, map_as_we):
        np.random.seed(0)
        results.append(way(mapper, item, Clock()))
    (image, label), (other_image, other_label) = results
    assert label.shape == (48, 32) and torch.equal(label, other_label.long())
    assert (image.int() - other_image.int()).abs().max() <= 2  # grey levels


def test_colour_jitter_sees_the_crop_alone(item, monkeypatch):
    seen = []
    monkeypatch.setattr(
        ColorAugSSDTransform, "apply_image", lambda self, image: seen.append(image.shape) or image
    )
    cfg = make_cfg(**{"INPUT.COLOR_AUG_SSD": True})
    run(SegmentationMapper(cfg, is_train=True), item)
    assert seen == [(24, 32, 3)]


def test_an_image_of_another_size_than_its_label_is_named(tmp_path):
    item = make_item(tmp_path, np.zeros((40, 60, 3), np.uint8), np.zeros((60, 40), np.uint8))
    message = r"image\.png has the size 60 x 40, and its label .*label\.png 40 x 60\. An image"
    with pytest.raises(DatasetError, match=message):
        run(SegmentationMapper(make_cfg(), is_train=True), item)


@pytest.mark.parametrize("flip", ["none", "horizontal", "vertical"])
def test_image_and_label_move_together(item, flip):
    mapper = SegmentationMapper(make_cfg(**{"INPUT.RANDOM_FLIP": flip}), is_train=True)
    for seed in range(8):
        out = run(mapper, item, seed)
        difference = (out["image"][0].int() - 10 * out["sem_seg"].int()).abs()
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


@pytest.mark.parametrize("size", [(40, 30), (97, 61), (300, 300)])
def test_test_images_have_the_pixels_of_detectron2s_resize(size):
    image = np.random.default_rng(0).integers(0, 256, (60, 97, 3), dtype=np.uint8)
    resize = T.ResizeShortestEdge(min(size), max(size)).get_transform(image)
    fitted = np.asarray(fit_into(Image.fromarray(image), size))
    np.testing.assert_array_equal(fitted, resize.apply_image(image))


@pytest.mark.parametrize(
    ("size", "shape"), [((32, 20), (3, 20, 32)), ((8, 8), (3, 5, 8)), (None, (3, 20, 32))]
)
def test_a_test_size_can_be_set_by_name(item, size, shape):
    item |= {"dataset_name": "camvid_day_val", "test_size": (16, 10)}
    mapper = SegmentationMapper(make_cfg(), is_train=False, test_sizes={"camvid_day_val": size})
    out = mapper(item)
    assert out["image"].shape == shape and out["test_size"] == size
    other = mapper({**item, "dataset_name": "camvid_day_test"})
    assert other["image"].shape == (3, 10, 16)


def test_the_config_gives_sizes_and_native_labels():
    sizes = [["camvid_day_val", 64, 48], ["cityscapes_val", 2048, 1024]]
    cfg = make_cfg(**{"TEST.SIZES": sizes, "TEST.NATIVE_LABELS": True})
    mapper = SegmentationMapper(cfg, is_train=False)
    assert mapper.test_sizes == {"camvid_day_val": (64, 48), "cityscapes_val": (2048, 1024)}
    assert mapper.native_labels
    assert not SegmentationMapper(make_cfg(), is_train=False).native_labels


def test_a_test_size_for_an_unknown_name_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"\['camvid_dya_val'\], but no such data set"):
        SegmentationMapper(make_cfg(), False, test_sizes={"camvid_dya_val": (8, 8)})


@pytest.mark.parametrize(("size", "half"), [((20, 32), (10, 16)), ((21, 33), (10, 16))])
def test_labels_are_halved_where_the_data_set_says_so(tmp_path, size, half):
    ids = np.random.default_rng(0).integers(0, 12, size, dtype=np.uint8)
    item = make_item(tmp_path, np.zeros((*size, 3), np.uint8), ids, halve_label=True)
    out = SegmentationMapper(make_cfg(), is_train=False)(item)
    label = read_label(out["sem_seg_file_name"], out["label_map"], out["halve_label"])
    assert (out["height"], out["width"]) == label.shape == half

    native = SegmentationMapper(make_cfg(), is_train=False, native_labels=True)(item)
    label = read_label(native["sem_seg_file_name"], native["label_map"], native["halve_label"])
    assert (native["height"], native["width"]) == label.shape == size

    cfg = make_cfg(**{"INPUT.CROP.ENABLED": False})
    trained = run(SegmentationMapper(cfg, is_train=True), item)
    assert trained["sem_seg"].shape[0] == 40  # training resizes by itself
    assert (trained["height"], trained["width"]) == size


def test_crops_of_unequal_sizes_are_refused():
    with pytest.raises(ValueError, match="INPUT.CROP.TYPE is 'relative_range'"):
        SegmentationMapper(make_cfg(**{"INPUT.CROP.TYPE": "relative_range"}), is_train=True)


@pytest.mark.parametrize("size", [[64], [0, 0], [64, -1], ["a", "b"], [64.5, 64], [1, 2, 3], []])
@pytest.mark.parametrize("is_train", [True, False])
def test_a_row_of_test_sizes_that_is_no_name_and_pair_is_refused_at_the_start(size, is_train):
    cfg = make_cfg()
    cfg.TEST.SIZES = [["camvid_day_test", *size]]
    with pytest.raises(ValueError, match=r"TEST\.SIZES holds \['camvid_day_test'.*whole pixels"):
        SegmentationMapper(cfg, is_train=is_train)


def test_a_crop_for_a_rare_class_is_drawn_again_until_it_shows_enough(item):
    """As a loop over Detectron2's transforms: at most ten draws, the last one stays."""
    drawn_for, wanted = 0, 300  # the last stripe: 16 x 24 = 384 pixels if the crop has all of it
    sizes = {"INPUT.MIN_SIZE_TRAIN": [23, 40]}
    cfg = make_cfg(**sizes, **{"DATALOADER.RARE_CLASS_CROP_PIXELS": wanted})
    mapper = SegmentationMapper(cfg, is_train=True)
    crop = T.RandomCrop_CategoryAreaConstraint("absolute", [24, 32], 0.75, 255)
    transforms = T.AugmentationList([T.ResizeShortestEdge([23, 40], 1333, "choice"), crop])
    draws = []
    for seed in range(40):
        out = run(mapper, {**item, "drawn_for": drawn_for}, seed)["sem_seg"].numpy()
        np.random.seed(seed)
        for draw in range(1, 11):  # noqa: B007 - the number of draws is used after the loop
            label = read_label(item["sem_seg_file_name"], "camvid")
            expected = T.AugInput(read_image(item["file_name"], "RGB"), sem_seg=label)
            transforms(expected)
            if (expected.sem_seg == drawn_for).sum() >= wanted:
                break
        draws.append(draw)
        height, width = expected.sem_seg.shape
        np.testing.assert_array_equal(out[:height, :width], expected.sem_seg)
    assert 1 in draws and max(draws) > 3
    first = SegmentationMapper(make_cfg(**sizes), is_train=True)
    for seed in range(10):  # an image that was drawn for no class takes the first crop
        assert run(mapper, item, seed)["sem_seg"].equal(run(first, item, seed)["sem_seg"])
