"""The refinement of labels by SAM's masks, with a fake SAM and with an untrained one."""

import numpy as np
import pytest
import torch

from fishertune_d2.modeling.sam_masks import LEAST_PIXELS, POINTS, Proposals, load_sam, refine


def picture() -> np.ndarray:
    """(24, 40): two parts of class 1, one of class 0, a speck of class 2, and an ignored part."""
    label = np.zeros((24, 40), np.uint8)
    label[2:10, 2:10], label[12:22, 20:35], label[0, 39], label[22:, :] = 1, 1, 2, 255
    return label


class FakeSam:
    """Proposes three boxes around the points of each region, the second of the best quality."""

    def __init__(self, size: tuple[int, int]):
        self.size = size
        self.points: np.ndarray | None = None

    def __call__(self, points: np.ndarray) -> Proposals:
        self.points = points
        masks = np.zeros((len(points), 3, *self.size), bool)
        for region, of_region in enumerate(points):
            (left, top), (right, bottom) = of_region.min(0), of_region.max(0)
            for k, grown in enumerate((3, 1, 0)):
                rows = slice(max(0, top - grown), bottom + 1 + grown)
                columns = slice(max(0, left - grown), right + 1 + grown)
                masks[region, k, rows, columns] = True
        quality = np.tile([0.5, 0.9, 0.2], (len(points), 1))
        return Proposals(masks, quality)


def test_regions_are_replaced_by_the_best_masks_and_overlaps_ignored():
    label, sam = picture(), FakeSam((24, 40))
    got = refine(label, sam, np.random.default_rng(0), least_pixels=20)
    assert sam.points.shape == (3, POINTS, 2)  # class 0, and both parts of class 1
    for region, (number, box) in enumerate(
        [(0, (slice(24), slice(40))), (1, (slice(2, 10), slice(2, 10))),
         (1, (slice(12, 22), slice(20, 35)))]
    ):  # fmt: skip
        inside = np.zeros_like(label, bool)
        inside[box] = True
        for x, y in sam.points[region]:
            assert label[y, x] == number and inside[y, x]
    masks = sam(sam.points).masks[:, 1]
    for y in range(24):
        for x in range(40):
            hits = [c for c, mask in zip((0, 1, 1), masks, strict=True) if mask[y, x]]
            assert got[y, x] == (hits[0] if len(hits) == 1 else 255)
    assert (got == 255).any() and (got == 0).any() and (got == 1).any()
    again = refine(label, sam, np.random.default_rng(0), least_pixels=20)
    assert np.array_equal(got, again)


def test_no_point_is_drawn_twice():
    sam = FakeSam((2, 3))
    refine(np.zeros((2, 3), np.uint8), sam, np.random.default_rng(0), least_pixels=5)
    assert len(np.unique(sam.points[0], axis=0)) == POINTS


def test_a_label_of_small_regions_stays():
    def never(points):
        raise AssertionError

    assert np.array_equal(refine(picture(), never, np.random.default_rng(0)), picture())
    label = np.zeros((100, 51), np.uint8)
    label[:, 50] = 1  # 5000 pixels of class 0 are not above the limit
    assert LEAST_PIXELS == 5000
    assert np.array_equal(refine(label, never, np.random.default_rng(0)), label)


def test_a_sam_of_transformers_is_loaded_and_asked(sam_folder):
    predict = load_sam(sam_folder, "cpu")
    image = torch.randint(0, 256, (3, 24, 40), generator=torch.Generator().manual_seed(1))
    image = image.to(torch.uint8)
    points = np.array([[[3, 4]] * POINTS, [[30, 15]] * POINTS])
    found = predict(image, points)
    assert found.masks.shape == (2, 3, 24, 40) and found.masks.dtype == bool
    assert found.quality.shape == (2, 3)
    swapped = load_sam(sam_folder, "cpu", "BGR")(image.flip(0), points)
    assert np.array_equal(found.quality, swapped.quality)
    label = refine(picture(), lambda p: predict(image, p), np.random.default_rng(0), 255, 20)
    assert set(np.unique(label)) <= {0, 1, 255}


def test_a_sam_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(ValueError, match="SELF_TRAINING.SAM is .*none"):
        load_sam(str(tmp_path / "none"), "cpu")
