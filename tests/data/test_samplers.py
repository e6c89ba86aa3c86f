"""The orders of the training data: of rare classes, and at any position as if never interrupted."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
from detectron2.data.samplers import RepeatFactorTrainingSampler
from detectron2.utils import comm

from fishertune_d2.data import build_train_loader
from fishertune_d2.data.samplers import (
    DAFORMER,
    SAMPLERS,
    RareClassSampler,
    RepeatFactorSampler,
    ResumableSampler,
    build_sampler,
    require_sampler,
)

# Pixels of three classes, then the ignored: class 0 is in all images, 1 in two, 2 in one of eight.
COUNTS = np.array([[90, 0, 0, 5]] * 5 + [[80, 10, 0, 5], [70, 20, 0, 5], [70, 0, 4, 5]])


def build(name, start=0, seed=3, block=2):
    sampler = build_sampler(
        name, len(COUNTS), seed=seed, block=block, class_counts=COUNTS, repeat_threshold=0.5
    )
    sampler.start = start
    return sampler


def drawn(sampler, number):
    return list(islice(sampler, number))


def test_the_default_order_is_the_one_of_earlier_versions():
    order = [index for _, index in drawn(ResumableSampler(5, seed=7, block=2), 15)]
    assert order == [2, 0, 4, 1, 3, 3, 0, 2, 1, 4, 0, 2, 1, 3, 4]
    assert drawn(build("TrainingSampler"), 30) == drawn(ResumableSampler(8, 3, 2), 30)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_order_goes_on_where_another_stopped(name):
    whole = drawn(build(name), 120)
    assert [position for position, _ in whole] == list(range(120))
    for start in (2, 8, 34, 100):
        assert drawn(build(name, start), 20) == whole[start : start + 20]
    sampler = build(name)
    assert drawn(sampler, 90) == whole[:90]
    assert drawn(sampler, 90) == whole[:90]  # a second time, from the start
    assert drawn(build(name, seed=4), 120) != whole


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_order_is_shared_by_ranks(name, monkeypatch):
    whole = drawn(build(name, block=4), 24)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    ranks = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        ranks.append(drawn(build(name, block=2), 12))
    steps = [whole[i : i + 2] for i in range(0, 24, 2)]
    assert ranks == [sum(steps[0::2], []), sum(steps[1::2], [])]


def test_images_repeat_by_detectron2s_factors():
    """A class in a share f of the images has the factor sqrt(0.5 / f); one in all has 1."""
    factors = build("RepeatFactorTrainingSampler").factors
    assert factors == pytest.approx([1] * 5 + [np.sqrt(0.5 / 0.25)] * 2 + [np.sqrt(0.5 / 0.125)])
    images = [{"annotations": [{"category_id": c} for c in range(3) if row[c]]} for row in COUNTS]
    oracle = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(images, 0.5)
    assert factors == pytest.approx(oracle.numpy())


def test_an_epoch_shows_an_image_as_often_as_its_factor_says_on_average():
    sampler = build("RepeatFactorTrainingSampler")
    number = 400 * int(sampler.factors.sum())
    seen = Counter(index for _, index in drawn(sampler, number))
    epochs = seen[0]
    assert all(seen[k] in (epochs - 1, epochs, epochs + 1) for k in range(5))
    assert abs(seen[7] - 2 * epochs) <= 2  # its factor is a whole number
    for k in (5, 6):
        assert seen[k] == pytest.approx(np.sqrt(2) * epochs, rel=0.06)


def test_no_rare_class_is_every_image_once_in_an_epoch():
    sampler = RepeatFactorSampler(COUNTS, 0.125, seed=3, block=1)
    epochs = np.array([index for _, index in drawn(sampler, 32)]).reshape(4, 8)
    assert (np.sort(epochs) == np.arange(8)).all()


def rare(counts=COUNTS, **options):
    return RareClassSampler(np.asarray(counts), 3, 1, DAFORMER._replace(**options))


def test_the_probabilities_of_classes_are_daformers():
    labelled = COUNTS[:, :3].sum(axis=0)
    share = labelled / labelled.sum()
    for temperature in (0.01, 0.3):
        weights = np.exp((1 - share) / temperature)
        expected = weights / weights.sum()
        assert rare(temperature=temperature).probabilities == pytest.approx(expected)


def test_rare_classes_are_drawn_as_often_as_their_probability():
    sampler = rare(temperature=0.5)
    seen = Counter(index for _, index in drawn(sampler, 4000))
    by_class = sampler.probabilities  # class 2 is in image 7 alone, class 0 in all eight
    assert seen[7] / 4000 == pytest.approx(by_class[2] + by_class[0] / 8, abs=0.03)
    assert (seen[5] + seen[6]) / 4000 == pytest.approx(by_class[1] + by_class[0] / 4, abs=0.03)


def test_an_image_needs_enough_pixels_of_the_class_it_is_drawn_for():
    counts = [[1, 100, 0], [1, 1, 0], [900, 0, 0], [1, 40, 0]]
    options = {"temperature": 1e-4}  # the rare class alone
    assert {i for _, i in drawn(rare(counts, min_pixels=40, **options), 200)} == {0, 3}
    assert {i for _, i in drawn(rare(counts, min_pixels=1, **options), 200)} == {0, 1, 3}
    # No image holds as many: each with a pixel of it may be drawn.
    assert {i for _, i in drawn(rare(counts, min_pixels=101, **options), 200)} == {0, 1, 3}


def test_a_sampler_names_the_class_for_which_it_drew():
    sampler = rare(temperature=0.5, min_pixels=1)
    classes = [sampler.class_at(position) for position in range(2000)]
    for position, index in drawn(sampler, 200):
        assert COUNTS[index, classes[position]] > 0
    share = np.bincount(classes, minlength=3) / 2000
    assert share == pytest.approx(sampler.probabilities, abs=0.03)
    assert build("TrainingSampler").class_at(3) is None
    # A class index is that of the labels, also if a class before it is never labelled.
    assert {rare([[5, 0, 3, 9]], min_pixels=1).class_at(k) for k in range(50)} <= {0, 2}


def test_tqdms_temperature_draws_all_classes_nearly_alike():
    probabilities = rare(temperature=100).probabilities
    assert probabilities == pytest.approx([1 / 3] * 3, abs=0.005)
    with pytest.raises(ValueError, match="RARE_CLASS_TEMPERATURE is 0: .* above 0"):
        rare(temperature=0)


def test_the_mapper_learns_the_class_from_the_loader():
    """Images of other samplers carry no class."""
    dicts = [{"file_name": f"{k}.png"} for k in range(8)]
    options = {"batch_size": 2, "num_workers": 0, "seed": 3, "class_counts": COUNTS}
    rare_class = DAFORMER._replace(temperature=0.5)
    loader = build_train_loader(
        dicts,
        dict,
        sampler="RareClassSampler",
        rare_class=DAFORMER._replace(temperature=0.5),
        **options,
    )
    items = [item for batch in islice(loader, 10) for item in batch]
    expected = RareClassSampler(COUNTS, 3, 2, rare_class)
    assert [item["drawn_for"] for item in items] == [expected.class_at(k) for k in range(20)]
    assert len({item["drawn_for"] for item in items}) > 1
    assert "drawn_for" not in next(iter(build_train_loader(dicts, dict, **options)))[0]


def test_a_class_that_is_never_labelled_is_never_drawn():
    sampler = rare([[5, 0, 3, 9], [5, 0, 0, 9]])
    assert sampler.classes.tolist() == [0, 2]
    with pytest.raises(ValueError, match="No label of the training data"):
        rare([[0, 0, 9]])


@pytest.mark.parametrize("threshold", [0.0, -0.1, 1.5])
def test_a_threshold_that_repeats_nothing_is_refused(threshold):
    with pytest.raises(ValueError, match=f"REPEAT_THRESHOLD is {threshold}: .* above 0"):
        RepeatFactorSampler(COUNTS, threshold, seed=3, block=1)


@pytest.mark.parametrize("name", ["RandomSubsetTrainingSampler", "trainingsampler", ""])
def test_an_unknown_sampler_lists_the_known_ones(name):
    dicts = [{"file_name": "0.png"}] * 8
    for use in (
        require_sampler,
        lambda name: build_train_loader(
            dicts, dict, batch_size=1, num_workers=0, seed=1, sampler=name
        ),
    ):
        with pytest.raises(ValueError, match=f"SAMPLER_TRAIN is {name!r}: choose from Tra.*Rare"):
            use(name)


@pytest.mark.parametrize("counts", [None, COUNTS[:7]])
@pytest.mark.parametrize("name", SAMPLERS[1:])
def test_counts_of_other_data_are_refused(name, counts):
    with pytest.raises(ValueError, match=f"{name} needs the class counts of all 8 images, got"):
        build_sampler(name, 8, seed=1, block=1, class_counts=counts, repeat_threshold=0.5)


@pytest.mark.parametrize("name", SAMPLERS[1:])
def test_the_loader_draws_by_the_sampler(name):
    dicts = [{"file_name": f"{k}.png", "k": k} for k in range(8)]
    loader = build_train_loader(
        dicts,
        dict,
        batch_size=2,
        num_workers=0,
        seed=3,
        sampler=name,
        class_counts=COUNTS,
        repeat_threshold=0.5,
    )
    got = [item["k"] for batch in islice(loader, 10) for item in batch]
    assert got == [index for _, index in drawn(build(name), 20)]


def warnings_of(caplog, counts):
    caplog.clear()
    with caplog.at_level("WARNING", logger="fishertune_d2"):
        for _ in range(2):  # a run builds a loader more than once
            build_sampler("RareClassSampler", len(counts), seed=0, block=1, class_counts=counts)
    return caplog.messages


@pytest.mark.parametrize("main", [True, False])
def test_a_rare_class_that_takes_nearly_all_draws_is_one_warning(caplog, monkeypatch, main):
    monkeypatch.setattr(comm, "is_main_process", lambda: main)
    counts = np.array([[80_000, 16_000, 4_000, 0]] * 3)
    texts = warnings_of(caplog, counts)
    assert len(texts) == main
    if main:
        assert "the class 2 is drawn for 100 % of the images, as it has 4.0 % of the la" in texts[0]
        assert "choose RepeatFactorTrainingSampler or TrainingSampler" in texts[0]


def test_a_class_of_few_images_is_one_warning(caplog):
    counts = np.array([[30_000, 30_000, 0, 0]] * 8 + [[10_000, 9_000, 240_000, 0]] * 2)
    counts[0, 2] = 10  # too few pixels to be drawn for the class
    (text,) = warnings_of(caplog, counts)
    assert "it draws only 2 images for the class 2 (" in text and "3000 pixels" in text
    assert warnings_of(caplog, np.full((3, 4), 5_000)) == []
