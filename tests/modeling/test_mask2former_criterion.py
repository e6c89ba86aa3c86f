"""Matching and losses of Mask2Former against naive float64 code, in one process and in two."""

import copy
import itertools
import multiprocessing
from datetime import timedelta

import pytest
import torch

from fishertune_d2.modeling.mask2former_criterion import Mask2FormerCriterion
from fishertune_d2.modeling.targets import SegmentationTargets, present_classes

from .test_mask2former import (
    CLASSES,
    IGNORE,
    LAYERS,
    NAMES,
    POINTS,
    blocky_targets,
    masks_of,
    random_features,
    tiny_config,
    tiny_head,
)

# ---- losses against a naive float64 reference -------------------------------------------------


def bilinear(image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Samples (h, w) at points (n, 2) of (x, y) in 0 .. 1; 0 outside. Written out."""
    height, width = image.shape
    x, y = points[:, 0] * width - 0.5, points[:, 1] * height - 0.5
    total = 0
    for dx, dy in itertools.product((0, 1), (0, 1)):
        column, row = x.floor() + dx, y.floor() + dy
        weight = (1 - (x - column).abs()) * (1 - (y - row).abs())
        inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
        value = image[row.clamp(0, height - 1).long(), column.clamp(0, width - 1).long()]
        total = total + weight * inside * value
    return total


def bce(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    p = logits.sigmoid()
    return -(labels * p.log() + (1 - labels) * (1 - p).log())


def naive_losses(class_logits, mask_logits, targets, matches, points, no_object=0.1):
    """Losses of one prediction, weighted, mask by mask; points (masks in the batch, n, 2)."""
    ce, ce_weight = 0, 0
    masks, dices, pair = [], [], 0
    count = sum(len(t.unique()) - int((t == IGNORE).any()) for t in targets)
    for b, (queries, picks) in enumerate(matches):
        present = [c for c in range(CLASSES) if (targets[b] == c).any()]
        wanted = dict(zip(queries.tolist(), picks.tolist(), strict=True))
        for q in range(class_logits.shape[1]):
            label = present[wanted[q]] if q in wanted else CLASSES
            weight = 1.0 if q in wanted else no_object
            ce = ce - weight * class_logits[b, q].softmax(-1)[label].log()
            ce_weight += weight
        for q, pick in wanted.items():
            logits = bilinear(mask_logits[b, q], points[pair])
            labels = bilinear((targets[b] == present[pick]).double(), points[pair])
            p = logits.sigmoid()
            masks.append(bce(logits, labels).mean())
            dices.append(1 - (2 * (p * labels).sum() + 1) / (p.sum() + labels.sum() + 1))
            pair += 1
    assert pair == len(points)
    return 2 * ce / ce_weight, 5 * sum(masks) / max(count, 1), 5 * sum(dices) / max(count, 1)


def test_losses_and_gradients_equal_a_naive_float64_reference(monkeypatch):
    head, targets = tiny_head(), blocky_targets()
    for layer in head.pixel_decoder.encoder.layers:
        # The initial ring samples exactly at cell centres, where bilinear sampling has a kink and
        # rounding picks one of two derivatives. Move the points off the grid.
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.01)
        torch.nn.init.uniform_(layer.self_attn.sampling_offsets.bias, -2, 2)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.1)
    exact = copy.deepcopy(head).double()
    matches, points = [], []
    match, draw = head.criterion.match, head.criterion.sample_points_using_uncertainty

    def recorded_match(*args):
        matches.extend(match(*args))
        return matches

    def recorded_draw(*args):
        points.append(draw(*args))
        return points[-1]

    monkeypatch.setattr(head.criterion, "match", recorded_match)
    monkeypatch.setattr(head.criterion, "sample_points_using_uncertainty", recorded_draw)

    maps = {name: x.requires_grad_() for name, x in random_features().items()}
    torch.manual_seed(3)
    _, losses = head(maps, targets)
    sum(losses.values()).backward()

    exact_maps = {n: x.detach().double().requires_grad_() for n, x in maps.items()}
    predictions = exact.predict(exact_maps)
    assert len(predictions) == len(matches) == len(points) == LAYERS
    assert set(losses) == {n + s for n in NAMES for s in ("", "_0", "_1")}
    total = 0
    # The final prediction is matched first, then those of the earlier layers in their order.
    for suffix, pair, match, place in zip(
        ("", "_0", "_1"), [predictions[-1], *predictions[:-1]], matches, points, strict=True
    ):
        reference = naive_losses(*pair, targets, match, place.double())
        for name, value in zip(("loss_ce", "loss_mask", "loss_dice"), reference, strict=True):
            torch.testing.assert_close(losses[name + suffix].double(), value, rtol=1e-5, atol=0)
        total = total + sum(reference)
    total.backward()

    pairs = dict(zip(head.parameters(), exact.parameters(), strict=True))
    pairs |= {maps[name]: exact_maps[name] for name in maps}
    scale = max(b.grad.norm() for b in pairs.values())
    for a, b in pairs.items():
        assert (a.grad.double() - b.grad).norm() <= 1e-4 * b.grad.norm() + 1e-6 * scale


def test_matching_is_the_cheapest_of_all():
    targets = blocky_targets()[:1]
    head = tiny_head(num_queries=5)
    masks, labels = masks_of(targets)
    with torch.no_grad():
        class_logits, mask_logits = head.predict(random_features(batch=1))[-1]
    torch.manual_seed(4)
    prediction = {"": (class_logits, mask_logits)}
    ((queries, picks),) = head.criterion.match(prediction, masks, labels)[0]
    torch.manual_seed(4)
    points = torch.rand(1, 1, POINTS, 2)[0, 0].double()

    cost = torch.empty(5, 4, dtype=torch.float64)
    for q, j in itertools.product(range(5), range(4)):
        logits = bilinear(mask_logits[0, q].double(), points)
        wanted = bilinear(masks[0][j].double(), points)
        p = logits.sigmoid()
        dice = 1 - (2 * (p * wanted).sum() + 1) / (p.sum() + wanted.sum() + 1)
        cost[q, j] = 5 * bce(logits, wanted).mean() + 5 * dice
        cost[q, j] -= 2 * class_logits[0, q].double().softmax(-1)[labels[0][j]]
    best = min(
        itertools.permutations(range(5), 4), key=lambda p: sum(cost[q, j] for j, q in enumerate(p))
    )
    assert sorted(zip(picks.tolist(), queries.tolist(), strict=True)) == list(enumerate(best))


def test_all_predictions_are_matched_as_transformers_matches_each(monkeypatch):
    head, targets = tiny_head(num_queries=3), blocky_targets()  # the first image has four classes
    masks, labels = masks_of(targets)
    with torch.no_grad():
        predictions = head.predict(random_features())
    named = {str(k): pair for k, pair in enumerate(predictions)}
    torch.manual_seed(4)
    found = head.criterion.match(named, masks, labels)
    torch.manual_seed(4)
    drawn = torch.rand(LAYERS, 2, POINTS, 2)
    for k, (class_logits, mask_logits) in enumerate(predictions):
        # transformers draws the points of one image after the other.
        points = iter(drawn[k][:, None])
        monkeypatch.setattr(torch, "rand", lambda *shape, points=points, **_: next(points))
        wanted = head.criterion.matcher(mask_logits, class_logits, masks, labels)
        for (queries, picks), (other_queries, other_picks) in zip(found[k], wanted, strict=True):
            assert queries.tolist() == other_queries.tolist()
            assert picks.tolist() == other_picks.tolist()


def test_weights_scale_the_losses_and_deep_supervision_can_be_off():
    # The weights are also the costs of the matcher: all are doubled, so that it chooses alike.
    weights = {"class_weight": 4.0, "mask_weight": 10.0, "dice_weight": 10.0}
    plain, double = (tiny_head(use_auxiliary_loss=False, **each) for each in ({}, weights))
    torch.manual_seed(5)
    _, once = plain(random_features(), blocky_targets())
    torch.manual_seed(5)
    _, twice = double(random_features(), blocky_targets())
    assert set(twice) == NAMES
    for name in NAMES:
        torch.testing.assert_close(twice[name], 2 * once[name])


# ---- ranks ------------------------------------------------------------------------------------


def _count_on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(minutes=5),
    )
    try:
        torch.save(_counts_and_losses(rank), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def _counts_and_losses(rank: int) -> tuple[list[float], list[float]]:
    criterion = Mask2FormerCriterion(tiny_config(), {})
    counts = []
    for masks in [(3, 0), (0, 0), (2, 5)]:
        labels = [torch.zeros(masks[rank], dtype=torch.long)]
        counts.append(criterion.get_num_masks(labels, torch.device("cpu")).item())
    # Rank 0 has one image more, so the losses must not wait for the other rank.
    return counts, _losses_of_images(range(rank, 2))


def _losses_of_images(images) -> list[float]:
    head, targets = tiny_head(), blocky_targets()
    targets = SegmentationTargets(targets, present_classes(targets, CLASSES, IGNORE))
    predictions = head.predict(random_features())
    losses = []
    for image in images:
        torch.manual_seed(image)
        losses.append(head.loss_of_image(predictions, targets, image).item())
    return losses


def test_the_number_of_masks_is_averaged_over_processes_but_for_single_images(tmp_path):
    other = multiprocessing.get_context("spawn").Process(
        target=_count_on_rank, args=(1, str(tmp_path))
    )
    other.start()
    _count_on_rank(0, str(tmp_path))  # here, because importing takes seconds in a new process
    other.join()
    assert other.exitcode == 0
    alone = _losses_of_images(range(2))
    for rank in (0, 1):
        counts, losses = torch.load(tmp_path / f"{rank}.pt")
        assert counts == [1.5, 1.0, 3.5]
        assert losses == pytest.approx(alone[rank:], rel=1e-5)
