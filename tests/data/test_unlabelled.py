"""Images without labels in the stream of training data."""

import random
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2.config import default_config
from fishertune_d2.data import find_unlabelled
from fishertune_d2.data.image_files import DatasetError
from fishertune_d2.data.loader import build_train_loader
from fishertune_d2.data.mapper import SegmentationMapper
from fishertune_d2.data.samplers import RareClass, RareClassSampler, ResumableSampler
from fishertune_d2.data.unlabelled import MixedSampler, Unlabelled

LABELLED = [{"file_name": f"{k}.png", "k": k} for k in range(5)]
OTHERS = [{"file_name": f"u{k}.png", "k": 100 + k} for k in range(4)]


def draw(item):
    """Maps an entry to its number and one number of each random generator."""
    return item["k"], np.random.rand(), random.random(), torch.rand(()).item()


def stream(unlabelled=None, start=0, count=40):
    loader = build_train_loader(
        LABELLED, draw, batch_size=2, num_workers=0, seed=7, unlabelled=unlabelled
    )
    loader.sampler.start = start
    return [each for batch in islice(loader, count // 2) for each in batch]


def test_one_labelled_image_comes_before_ratio_others():
    mixed = stream(Unlabelled(OTHERS, ratio=2, begin=6))
    numbers = [each[0] for each in mixed]
    assert [each >= 100 for each in numbers[6:]] == [i % 3 > 0 for i in range(34)]
    # The labelled images go on as if there were no others; all of each kind come in each epoch.
    labelled = [n for n in numbers if n < 100]
    assert labelled == [each[0] for each in stream()][: len(labelled)]
    others = [n for n in numbers if n >= 100]
    assert all(sorted(others[i : i + 4]) == [100, 101, 102, 103] for i in range(0, 20, 4))


def test_before_they_join_nothing_changes_and_a_resumed_stream_goes_on():
    whole = stream(Unlabelled(OTHERS, ratio=1, begin=20))
    assert whole[:20] == stream()[:20]
    assert stream(Unlabelled(OTHERS, ratio=1, begin=20), start=26, count=14) == whole[26:]


def test_the_mix_is_a_plain_count():
    sampler = MixedSampler(ResumableSampler(5, 3, 1), Unlabelled(OTHERS, ratio=3, begin=4))
    alone, others = ResumableSampler(5, 3, 1), ResumableSampler(4, 4, 1)
    expected, seen, unseen = [], 0, 0
    for position in range(60):
        if position < 4 or (position - 4) % 4 == 0:
            expected.append(alone.entry(seen))
            seen += 1
        else:
            expected.append(5 + others.entry(unseen))
            unseen += 1
    assert [sampler.entry(position) for position in range(60)] == expected
    assert [sampler.entry(position) for position in (50, 3, 17)] == [
        expected[position] for position in (50, 3, 17)
    ]


def test_rare_classes_are_those_of_the_labelled_images():
    counts = np.array([[5, 0, 9], [5, 3, 9], [5, 0, 9]])
    alone = RareClassSampler(counts, 3, 1, RareClass(temperature=1.0, min_pixels=1))
    mixed = MixedSampler(alone, Unlabelled(OTHERS, ratio=1, begin=2))
    classes = [mixed.class_at(position) for position in range(40)]
    expected = [alone.class_at(k) for k in range(40)]
    assert classes[:2] == expected[:2]
    assert classes[2::2] == expected[2:21]
    assert set(classes[3::2]) == {None} and set(classes[2::2]) == {0, 1}


def test_a_folder_is_searched_with_those_below_it(tmp_path):
    for name in ("b.png", "a/x.JPG", "a/y.jpeg", "notes.txt", "a/.hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [item["file_name"] for item in find_unlabelled(str(tmp_path))]
    assert found == [str(tmp_path / name) for name in ("a/x.JPG", "a/y.jpeg", "b.png")]
    (tmp_path / "none").mkdir()
    for place in ("none", "missing"):
        with pytest.raises(DatasetError, match=f"SELF_TRAINING.IMAGES is .*{place}"):
            find_unlabelled(str(tmp_path / place))


def test_the_clean_copy_differs_in_colours_alone(tmp_path):
    cfg = default_config()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.CROP.SIZE = [20], [24, 16]
    image = np.random.default_rng(0).integers(0, 256, (20, 40, 3), dtype=np.uint8)
    Image.fromarray(image).save(tmp_path / "a.png")
    mapper, seen, jitters = SegmentationMapper(cfg, is_train=True), set(), 0
    for seed in range(20):
        np.random.seed(seed)
        random.seed(seed)
        item = mapper({"file_name": str(tmp_path / "a.png")})
        assert "sem_seg" not in item and item["valid_size"] == (20, 16)
        assert item["image"].shape == item["clean_image"].shape == (3, 24, 16)
        clean = item["clean_image"][:, :20].permute(1, 2, 0).numpy()
        flipped = clean[:, ::-1]
        places = [
            (x, k)
            for x in range(25)
            for k, each in enumerate((clean, flipped))
            if np.array_equal(each, image[:, x : x + 16])
        ]
        assert len(places) == 1  # the clean copy is a part of the file, maybe mirrored
        seen |= {places[0][1]}
        jitters += not torch.equal(item["image"], item["clean_image"])
        assert torch.equal(item["image"][:, 20:], item["clean_image"][:, 20:])  # padding
    assert seen == {0, 1} and jitters > 15  # each of four jitters is left out of half the images
    cfg.INPUT.COLOR_AUG_SSD = False
    item = SegmentationMapper(cfg, is_train=True)({"file_name": str(tmp_path / "a.png")})
    assert torch.equal(item["image"], item["clean_image"])
