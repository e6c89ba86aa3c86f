"""The short way selects what its parts select."""

import pytest
import torch

from fishertune_d2.fisher import (
    ALLOCATIONS,
    UNITS,
    FisherEstimate,
    ImageShift,
    Selection,
    StatisticsPerturbation,
    Units,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
    select,
    steps_of_units,
)


def test_equals_its_parts(vit, images, loss):
    model, batches = vit(), [images(3), images(3)]
    selection = select(model, batches, loss)
    shift = StatisticsPerturbation.of_vit(model)
    estimate = estimate_fisher(model, batches, loss, find_candidates(model), perturb=shift)
    base = sum(p.numel() for p in model.parameters())
    expected = Selection.from_scores(domain_related_fisher(estimate), 0.05, base)
    assert (selection.share, selection.base) == (0.05, base)
    assert selection.notes == estimate.notes | {"images": "6"}
    assert all(torch.equal(selection.indices[n], i) for n, i in expected.indices.items())


@pytest.mark.parametrize("unit", UNITS)
@pytest.mark.parametrize("allocation", ALLOCATIONS)
def test_units_are_ranked_by_drf_of_their_means(unit, allocation, vit, images, loss):
    model, batches = vit(), [images(3)]
    options = {"unit": unit, "allocation": allocation, "steps": "fisher"}
    selection = select(model, batches, loss, **options)
    shift = StatisticsPerturbation.of_vit(model)
    estimate = estimate_fisher(model, batches, loss, find_candidates(model), perturb=shift)
    units = Units(unit, estimate.shapes)
    means = FisherEstimate(
        units.mean(estimate.f), units.mean(estimate.shifted), estimate.shift_weight, images=3
    )
    scores, base = domain_related_fisher(means), sum(p.numel() for p in model.parameters())
    expected = Selection.from_scores(scores, 0.05, base, units, allocation)
    assert (selection.unit, selection.shapes) == (unit, expected.shapes)
    assert selection.notes.get("allocation", "global") == allocation
    steps = steps_of_units(estimate.f, selection)
    assert all(torch.equal(selection.steps[n], each) for n, each in steps.items())
    assert all(torch.equal(selection.indices[n], i) for n, i in expected.indices.items())


def test_passes_its_options_on(vit, images, loss):
    model = vit()
    shift = StatisticsPerturbation([model.blocks[0]], num_prefix_tokens=1, strength=0.25)
    options = {"estimator": "diagonal_loop", "perturb": shift, "base": 1000}
    selection = select(model, [images(2)], loss, 0.5, **options)
    assert selection.count(0.5) == 500
    assert selection.notes["estimator"] == "diagonal_loop"
    assert selection.notes["strength"] == "0.25"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": "natural"}, "unknown steps 'natural': choose from equal, fisher"),
        ({"allocation": "block"}, "unknown allocation 'block': choose from global, layer"),
        ({"share": 5}, r"share of 5 of .* choose from 0 to at most 0\.\d+, since"),
        ({"share": 0.95}, r"share of 0.95 of .* choose from 0 to at most 0\.\d+, since"),
    ],
)
def test_refuses_before_the_estimate_what_cannot_be_selected(options, message, vit, images):
    with pytest.raises(ValueError, match=message):
        select(vit(), [images(2)], lambda model, batch: pytest.fail("measured"), **options)


def test_batches_of_one_image_have_no_shift_by_eq6(vit, images, loss):
    with pytest.raises(ValueError, match="have one image, so Eq. 6 shifts nothing.*batch_size=4"):
        select(vit(), (images(1) for _ in range(4)), loss)
    select(vit(), iter([images(3), images(1)]), loss)  # what a loader has left
    batch = [{"image": 50 * image + 128, "label": label} for image, label in images(1)]
    select(
        vit(),
        [batch],
        lambda model, batch: loss(model, [(item["image"], item["label"]) for item in batch]),
        perturb=ImageShift(lambda image, random: image // 2, "darker"),
    )
