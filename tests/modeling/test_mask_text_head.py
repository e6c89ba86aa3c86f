"""The mask-pooled text classifier against plain loops in float64, and the contract of heads."""

import math

import pytest
import torch
from detectron2.modeling import build_sem_seg_head

from fishertune_d2.config import default_config
from fishertune_d2.modeling.heads import SegmentationHead
from fishertune_d2.modeling.mask_text_head import (
    TEMPLATES,
    MaskTextClassifier,
    MaskTextHead,
    encode_classes,
    pool_masks,
)
from fishertune_d2.modeling.targets import SegmentationTargets, present_classes

from .test_mask2former import CLASSES, blocky_targets, random_features, shapes, tiny_config

NAMES = ["road", "car, van,truck", "sky", "person, rider", "tree"]


def texts(dim: int = 12) -> list[torch.Tensor]:
    """Embeddings of the names above, of any length."""
    torch.manual_seed(4)
    return [3 * torch.randn(count, dim) for count in (1, 3, 1, 2, 1)]


def tiny_head(**changes) -> MaskTextHead:
    torch.manual_seed(0)
    return MaskTextHead(shapes(), tiny_config(**changes), texts())


@pytest.fixture
def tower():
    """The tiny text tower, untrained, in float64."""
    pytest.importorskip("open_clip")
    from fishertune_d2.modeling.text_tower import TextTower

    torch.manual_seed(1)
    return TextTower("tiny", "random").double()


def test_logits_are_scaled_cosines_with_the_best_name():
    torch.manual_seed(2)
    classifier = MaskTextClassifier(texts(), 8, 6).double()
    queries, masks = torch.randn(2, 3, 8).double(), torch.randn(2, 3, 4, 5).double()
    features = torch.randn(2, 6, 4, 5).double()
    masks[0, 1] = -1.0  # no pixel inside
    got = classifier(queries, masks, features)
    assert got.shape == (2, 3, CLASSES + 1)
    norm, linear = classifier.pooled
    for b in range(2):
        for q in range(3):
            inside = [
                features[b, :, i, j] for i in range(4) for j in range(5) if masks[b, q, i, j] > 0
            ]
            mean = sum(inside) / len(inside) if inside else torch.zeros(6).double()
            x = linear(norm(mean)) + queries[b, q]
            layers = [m for m in classifier.embed if isinstance(m, torch.nn.Linear)]
            assert len(layers) == 3
            for k, layer in enumerate(layers):
                x = layer(x).relu() if k < 2 else layer(x)

            def cosine(text, x=x):
                text = text.double()
                return (x @ text / (x.norm() * text.norm())).item()

            expected = [max(cosine(name) for name in names) for names in texts()]
            expected.append(cosine(classifier.no_object.weight[0]))
            expected = torch.tensor(expected) / 0.07
            torch.testing.assert_close(got[b, q].float(), expected, rtol=1e-5, atol=1e-5)


def test_the_scale_is_learned_and_at_most_100():
    classifier = MaskTextClassifier(texts(), 8, 6)
    assert float(classifier.log_scale) == pytest.approx(math.log(1 / 0.07))
    inputs = torch.randn(1, 2, 8), torch.ones(1, 2, 3, 3), torch.randn(1, 6, 3, 3)
    before = classifier(*inputs)
    with torch.no_grad():
        classifier.log_scale += 50.0
    torch.testing.assert_close(classifier(*inputs), before * 100 * 0.07, rtol=1e-4, atol=1e-4)


def test_pooling_counts_pixels_inside():
    features = torch.arange(8.0).view(1, 2, 2, 2)
    masks = torch.tensor([[[[1.0, -1.0], [2.0, 0.0]], [[-1.0, -1.0], [-1.0, 0.0]]]])
    assert pool_masks(features, masks).tolist() == [[[1.0, 5.0], [0.0, 0.0]]]


def test_pooling_does_not_overflow_in_half_precision():
    """The sum over 192 x 192 pixels would be beyond float16's largest number."""
    features, masks = torch.full((1, 2, 192, 192), 3.0), torch.ones(1, 1, 192, 192)
    with torch.autocast("cpu", torch.float16):
        assert pool_masks(features.half(), masks.half()).tolist() == [[[3.0, 3.0]]]


def test_names_are_means_over_templates(tower):
    assert len(TEMPLATES) == len(set(TEMPLATES)) == 14
    got = encode_classes(tower, NAMES)
    assert [len(of_class) for of_class in got] == [1, 3, 1, 2, 1]
    for name, embedding in (("road", got[0][0]), ("truck", got[1][2]), ("rider", got[3][1])):
        each = [tower.encode_texts([t.format(name)])[0] for t in TEMPLATES]
        mean = sum(e / e.norm() for e in each) / 14
        torch.testing.assert_close(embedding, mean / mean.norm())
    with pytest.raises(ValueError, match="a class of the name ' , '"):
        encode_classes(tower, ["road", " , "])


def test_head_reads_the_config_and_its_texts_are_in_the_state_dict():
    pytest.importorskip("open_clip")
    cfg = default_config()
    keys = {
        "MODEL.SEM_SEG_HEAD.NAME": "MaskTextHead", "MODEL.SEM_SEG_HEAD.NUM_CLASSES": CLASSES,
        "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32, "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
        "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1, "MODEL.MASK_FORMER.HIDDEN_DIM": 32,
        "MODEL.MASK_FORMER.NHEADS": 4, "MODEL.MASK_FORMER.DEC_LAYERS": 3,
        "MODEL.MASK_FORMER.NUM_OBJECT_QUERIES": 8, "MODEL.TEXT.NAME": "tiny",
        "MODEL.TEXT.WEIGHTS": "random", "MODEL.TEXT.CLASSES": NAMES,
    }  # fmt: skip
    for key, value in keys.items():
        cfg.merge_from_list([key, value])
    torch.manual_seed(0)
    first, second = (build_sem_seg_head(cfg, shapes()).eval() for _ in range(2))
    assert isinstance(first, SegmentationHead)
    assert not any(name.startswith("text.") for name, _ in first.named_parameters())
    features = random_features()
    with torch.no_grad():
        before = first(features)[0]
        assert not torch.equal(before, second(features)[0])
        second.load_state_dict(first.state_dict())  # with another random text tower
        assert torch.equal(before, second(features)[0])
    cfg.MODEL.TEXT.CLASSES = NAMES[:3]
    with pytest.raises(ValueError, match="MODEL.TEXT.CLASSES has 3 names"):
        build_sem_seg_head(cfg, shapes())


def test_all_parameters_train_and_the_texts_do_not():
    head, targets = tiny_head(), blocky_targets()
    _, losses = head(random_features(), targets)
    assert {"loss_ce", "loss_mask", "loss_dice", "loss_ce_0"} <= losses.keys()
    sum(losses.values()).backward()
    without = {name for name, p in head.named_parameters() if p.grad is None}
    assert not without and "class_predictor.texts.embeddings" in head.state_dict()
    with pytest.raises(ValueError, match="texts of 2 classes"):
        MaskTextHead(shapes(), tiny_config(), texts()[:2])


def test_an_images_loss_is_that_of_a_batch_of_one():
    head, targets, features = tiny_head().eval(), blocky_targets(), random_features()
    batch = SegmentationTargets(targets, present_classes(targets, CLASSES, 255))
    for image in range(2):
        torch.manual_seed(7)
        alone = {name: m[image : image + 1] for name, m in features.items()}
        _, losses = head(alone, batch.of_image(image))
        torch.manual_seed(7)
        predictions = head.predict(features)
        torch.manual_seed(7)
        got = head.loss_of_image(predictions, batch, image)
        torch.testing.assert_close(got, sum(losses.values()), rtol=1e-4, atol=1e-4)
    logs = head.log_probabilities(predictions)
    torch.testing.assert_close(logs.exp().sum(1), torch.ones(2, 18, 23))
    assert head.loss_divisors(list(targets)).keys() == {"loss_ce", "loss_mask", "loss_dice"}
