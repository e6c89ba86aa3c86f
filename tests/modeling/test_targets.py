"""Which classes an image holds, and their masks."""

import pytest
import torch

from fishertune_d2.modeling.targets import present_classes

from .test_mask2former import (
    CLASSES,
    IGNORE,
    blocky_targets,
    masks_of,
    random_features,
    tiny_head,
)


def test_ignored_pixels_are_background_of_every_mask():
    target = torch.tensor([[[0, 0, 4], [IGNORE, 4, IGNORE]]])
    masks, labels = masks_of(target)
    assert labels[0].tolist() == [0, 4]
    assert masks[0].tolist() == [[[1, 1, 0], [0, 0, 0]], [[0, 0, 1], [0, 1, 0]]]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_classes_are_found_in_labels_of_any_integer_type(dtype):
    found = present_classes(blocky_targets().to(dtype), CLASSES, IGNORE)
    assert [classes.tolist() for classes in found] == [[0, 1, 2, 4], [2, 3]]
    assert all(classes.dtype == torch.int64 for classes in found)


@pytest.mark.parametrize("value", [CLASSES, -1, 254])
def test_a_label_out_of_range_is_named(value):
    targets = blocky_targets()
    targets[1, 0, 0] = value
    with pytest.raises(ValueError, match=rf"image 1 .* \[{value}\].*NUM_CLASSES"):
        tiny_head()(random_features(), targets)
