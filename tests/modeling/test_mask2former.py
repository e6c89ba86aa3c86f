"""The head: initialisation, losses and gradients against naive float64 code, labels, ranks."""

import itertools

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_sem_seg_head
from transformers import Mask2FormerConfig

from fishertune_d2.config import default_config
from fishertune_d2.modeling.mask2former import Mask2FormerHead, semantic_scores
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
