"""The head: initialisation, losses and gradients against naive float64 code, labels, ranks."""

import copy
import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_sem_seg_head
from transformers import Mask2FormerConfig

from fishertune_d2.config import default_config
from fishertune_d2.modeling.mask2former import Mask2FormerHead, semantic_scores
from fishertune_d2.modeling.mask2former_criterion import Mask2FormerCriterion
from fishertune_d2.modeling.targets import SegmentationTargets, present_classes, semantic_masks

CLASSES, QUERIES, LAYERS, POINTS, CHANNELS = 5, 8, 3, 64, 24
IGNORE = 255
NAMES = {"loss_ce", "loss_mask", "loss_dice"}


def shapes(channels: int = CHANNELS) -> dict[str, ShapeSpec]:
    return {f"res{i}": ShapeSpec(channels=channels, stride=2**i) for i in (2, 3, 4, 5)}


def tiny_config(**changes) -> Mask2FormerConfig:
    values = {
        "num_labels": CLASSES,
        "feature_size": 32,
        "mask_feature_size": 32,
        "hidden_dim": 32,
        "encoder_layers": 1,
        "encoder_feedforward_dim": 64,
        "decoder_layers": LAYERS,
        "dim_feedforward": 64,
        "num_queries": QUERIES,
        "num_attention_heads": 4,
        "train_num_points": POINTS,
    }
    return Mask2FormerConfig(**{**values, **changes})


def tiny_head(**changes) -> Mask2FormerHead:
    torch.manual_seed(0)
    return Mask2FormerHead(shapes(), tiny_config(**changes))


def random_features(batch: int = 2, height: int = 70, width: int = 90) -> dict[str, torch.Tensor]:
    """Maps of an image whose sides are no multiple of the strides, as a ViT's pyramid gives."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(
            batch, CHANNELS, -(-height // s.stride), -(-width // s.stride), generator=generator
        )
        for name, s in shapes().items()
    }


def masks_of(targets: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """The masks and classes of each image of (B, H, W)."""
    classes = present_classes(targets, CLASSES, IGNORE)
    return semantic_masks(SegmentationTargets(targets, classes))


def blocky_targets() -> torch.Tensor:
    """(2, 70, 90): four classes and an ignored part, then two classes."""
    targets = torch.full((2, 70, 90), IGNORE)
    targets[0, :40, :30], targets[0, :40, 30:] = 0, 2
    targets[0, 40:, :60], targets[0, 40:60, 60:] = 4, 1
    targets[1, :, :50], targets[1, :, 50:] = 3, 2
    return targets


# ---- building ------------------------------------------------------------------------------


def test_published_size_has_the_published_number_of_parameters():
    head = Mask2FormerHead(shapes(1024), Mask2FormerConfig(num_labels=19))
    assert sum(p.numel() for p in head.parameters()) == 20_565_204


def test_reads_the_usual_keys():
    cfg = default_config()
    cfg.merge_from_list(
        "MODEL.SEM_SEG_HEAD.NUM_CLASSES 7 MODEL.SEM_SEG_HEAD.CONVS_DIM 64 "
        "MODEL.SEM_SEG_HEAD.MASK_DIM 16 MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS 2 "
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD 40 MODEL.MASK_FORMER.HIDDEN_DIM 32 "
        "MODEL.MASK_FORMER.NHEADS 4 MODEL.MASK_FORMER.DIM_FEEDFORWARD 48 "
        "MODEL.MASK_FORMER.DEC_LAYERS 4 MODEL.MASK_FORMER.NUM_OBJECT_QUERIES 9 "
        "MODEL.MASK_FORMER.TRAIN_NUM_POINTS 50".split()
    )
    head = build_sem_seg_head(cfg, shapes())
    assert head.class_predictor.weight.shape == (8, 32)
    assert len(head.pixel_decoder.encoder.layers) == 2
    assert head.pixel_decoder.encoder.layers[0].fc1.weight.shape == (40, 64)
    assert head.pixel_decoder.mask_projection.weight.shape == (16, 64, 1, 1)
    assert len(head.transformer.decoder.layers) == 3  # one prediction is made before any layer
    assert head.transformer.decoder.layers[0].fc1.weight.shape == (48, 32)
    assert head.transformer.queries_features.weight.shape == (9, 32)
    assert head.criterion.num_points == head.criterion.matcher.num_points == 50
    assert head.loss_weights == {"loss_cross_entropy": 2.0, "loss_mask": 5.0, "loss_dice": 5.0}


def test_two_builds_from_one_seed_are_equal_and_leave_no_raw_memory():
    # In this mode PyTorch fills new memory with NaN, so what nobody initialises shows.
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        first, second = tiny_head(), tiny_head()
    finally:
        torch.use_deterministic_algorithms(False)
    for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True):
        assert a.isfinite().all(), name
        assert torch.equal(a, b), name


def test_initialised_as_published():
    head = tiny_head()
    deformable = head.pixel_decoder.encoder.layers[0].self_attn
    ring = deformable.sampling_offsets.bias.view(4, 3, 4, 2)  # heads, levels, points, (x, y)
    directions = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    for level, point in itertools.product(range(3), range(4)):
        torch.testing.assert_close(
            ring[:, level, point], (point + 1) * directions, atol=1e-6, rtol=0
        )
    assert not deformable.sampling_offsets.weight.any()
    assert not deformable.attention_weights.weight.any()
    # Xavier over the fused (3 D, D) matrix: sqrt(6 / (D + 3 D))
    bound = (6 / (32 + 3 * 32)) ** 0.5
    layer = head.transformer.decoder.layers[0]
    for weight in (layer.self_attn.q_proj.weight, layer.cross_attn.in_proj_weight):
        assert 0.95 * bound < weight.abs().max() <= bound
    assert 0.6 < head.pixel_decoder.level_embed.std() < 1.4


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"feature_size": 48}, "CONVS_DIM"),
        ({"hidden_dim": 30, "num_attention_heads": 2}, "HIDDEN_DIM"),
        ({"no_object_weight": 0.0}, "NO_OBJECT_WEIGHT"),
    ],
)
def test_impossible_values_name_their_key(changes, key):
    with pytest.raises(ValueError, match=key):
        tiny_head(**changes)


def test_other_strides_are_refused():
    wrong = shapes() | {"res5": ShapeSpec(channels=CHANNELS, stride=16)}
    with pytest.raises(ValueError, match="IN_FEATURES"):
        Mask2FormerHead(wrong, tiny_config())


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
    masks, dices, row = [], [], 0
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
            logits = bilinear(mask_logits[b, q], points[row])
            labels = bilinear((targets[b] == present[pick]).double(), points[row])
            p = logits.sigmoid()
            masks.append(bce(logits, labels).mean())
            dices.append(1 - (2 * (p * labels).sum() + 1) / (p.sum() + labels.sum() + 1))
            row += 1
    assert row == len(points)
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


# ---- labels -----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["no label", "one class", "one image without label"])
def test_poor_labels_train(case):
    targets = torch.full((2, 70, 90), IGNORE)
    if case == "one class":
        targets[:] = 3
    elif case == "one image without label":
        targets[0, 10:50] = 1
    head = tiny_head()
    _, losses = head(random_features(), targets)
    sum(losses.values()).backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert (losses["loss_mask"] == 0) == (case == "no label")
    for name, parameter in head.named_parameters():
        assert parameter.grad is not None, name  # a missing one would make DDP wait for ever
        assert parameter.grad.isfinite().all(), name


def test_what_is_not_finite_is_named():
    head = tiny_head()
    with torch.no_grad():
        head.class_predictor.bias[2] = float("inf")
    with pytest.raises(FloatingPointError) as error:
        head(random_features(), blocky_targets())
    assert "class logits, class logits_0, class logits_1 (" in str(error.value)
    assert "mask logits" not in str(error.value)


# ---- scores, precision, randomness ------------------------------------------------------------


def test_scores_bring_the_mask_logits_to_the_image_first():
    head, maps = tiny_head().eval(), random_features()
    with torch.no_grad():
        scores, losses = head(maps, image_size=(70, 90))
        class_logits, mask_logits = head.predict(maps)[-1]
    assert losses == {} and scores.shape == (2, CLASSES, 70, 90)
    full = torch.nn.functional.interpolate(mask_logits, (70, 90), mode="bilinear")
    for c, row, column in [(0, 0, 0), (2, 33, 71), (4, 69, 89)]:
        naive = sum(
            class_logits[1, q].softmax(-1)[c] * full[1, q, row, column].sigmoid()
            for q in range(QUERIES)
        )
        torch.testing.assert_close(scores[1, c, row, column], naive)
    with torch.no_grad():
        assert head(maps)[0].shape == (2, CLASSES, 18, 23)


def test_scores_leave_out_no_object():
    class_logits = torch.tensor([[[50.0, 0.0, 0.0], [0.0, 0.0, 50.0]]])  # class 0; no object
    scores = semantic_scores(class_logits, torch.full((1, 2, 3, 3), 50.0))
    torch.testing.assert_close(scores[0, :, 0, 0], torch.tensor([1.0, 0.0]))


def test_scores_are_float32_under_autocast():
    generator = torch.Generator().manual_seed(2)
    logits = [torch.randn(shape, generator=generator) for shape in ((1, 4, 6), (1, 4, 5, 7))]
    expected = semantic_scores(*logits)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(semantic_scores(*logits), expected)


def test_losses_are_float32_under_autocast():
    head = tiny_head()
    torch.manual_seed(6)
    _, reference = head(random_features(), blocky_targets())
    torch.manual_seed(6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, losses = head(random_features(), blocky_targets())
    for name, loss in losses.items():
        assert loss.dtype == torch.float32
        torch.testing.assert_close(loss, reference[name], rtol=0.05, atol=0)


def test_the_pixel_decoders_layers_are_in_training_mode_if_they_have_dropout():
    modes = []
    for dropout in (0.0, 0.1):
        layers = tiny_head(dropout=dropout).train().pixel_decoder.encoder.layers
        modes.append([module.training for module in layers.modules()])
    assert not any(modes[0]) and all(modes[1])


def test_dropout_skips_no_decoder_layer():
    head = tiny_head(dropout=0.9)
    assert [len(head.predict(random_features(1))) for _ in range(5)] == [LAYERS] * 5


def test_one_seed_gives_one_loss():
    head, maps, targets = tiny_head(), random_features(), blocky_targets()
    values = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        values.append(sum(head(maps, targets)[1].values()).item())
    assert values[0] == values[1] != values[2]


# ---- ranks ------------------------------------------------------------------------------------


def _count_on_rank(rank: int, folder: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    criterion = Mask2FormerCriterion(tiny_config(), {})
    counts = []
    for masks in [(3, 0), (0, 0), (2, 5)]:
        labels = [torch.zeros(masks[rank], dtype=torch.long)]
        counts.append(criterion.get_num_masks(labels, torch.device("cpu")).item())
    losses = _losses_of_images(range(rank, 2))  # rank 0 has one more: waiting would never end
    torch.save((counts, losses), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


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
    torch.multiprocessing.spawn(_count_on_rank, (str(tmp_path),), nprocs=2)
    alone = _losses_of_images(range(2))
    for rank in (0, 1):
        counts, losses = torch.load(tmp_path / f"{rank}.pt")
        assert counts == [1.5, 1.0, 3.5]
        assert losses == pytest.approx(alone[rank:], rel=1e-5)
