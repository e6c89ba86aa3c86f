"""tqdm's head against its published formulas, in float64."""

import math

import torch
from detectron2.config import CfgNode
from pytest import approx, fixture, mark, raises
from torch import nn
from torch.nn import functional as F
from transformers.models.mask2former.modeling_mask2former import Mask2FormerTransformerModule

from fishertune_d2.config import changed, default_config
from fishertune_d2.engine.parameter_counts import build_empty
from fishertune_d2.modeling import text_losses
from fishertune_d2.modeling.class_prompts import ClassPrompts
from fishertune_d2.modeling.frozen import frozen_parameters
from fishertune_d2.modeling.patch_neck import PatchNeck
from fishertune_d2.modeling.segmentor import VFMSegmentor
from fishertune_d2.modeling.targets import SegmentationTargets, present_classes
from fishertune_d2.modeling.text_query_head import TextQueryHead
from fishertune_d2.modeling.text_refinement import TextRefinement
from fishertune_d2.modeling.text_tower import TextTower
from fishertune_d2.modeling.vfm import BLOCKS, CLIP

TEXT_HEAD = {
    "MODEL.VFM.OUT_FEATURES": [*BLOCKS, *CLIP],
    "MODEL.SEM_SEG_HEAD.NAME": "TextQueryHead",
    "MODEL.SEM_SEG_HEAD.IN_FEATURES": list(BLOCKS),
}
TINY = {
    "MODEL.DEVICE": "cpu",
    "MODEL.VFM.NAME": "tiny",
    "MODEL.VFM.WEIGHTS": "random",
    "MODEL.VFM.IMG_SIZE": [64, 64],
    "MODEL.TEXT.NAME": "tiny",
    "MODEL.TEXT.WEIGHTS": "random",
    "MODEL.TEXT.CLASSES": ["sky", "building", "road"],
}


def config(options: dict, **others) -> CfgNode:
    options = options | {key.replace("__", "."): value for key, value in others.items()}
    return changed(default_config(), [word for pair in options.items() for word in pair])


@fixture
def model(tiny_head) -> VFMSegmentor:
    torch.manual_seed(0)
    return VFMSegmentor(config(tiny_head | TEXT_HEAD | TINY)).eval()


@fixture
def head(model) -> TextQueryHead:
    """The head in float64, in which no weight is a constant."""
    for parameter in {*model.sem_seg_head.parameters()} - frozen_parameters(model):
        parameter.data += 0.1 * torch.randn_like(parameter)
    head = model.sem_seg_head.double()
    head.criterion.float()  # losses are computed in float32
    return head


def features(images: int = 2, side: int = 4) -> dict[str, torch.Tensor]:
    torch.manual_seed(2)
    shapes = dict.fromkeys(BLOCKS, (images, 64, side, side)) | {
        "clip_dense": (images, 64, side, side)
    }
    shapes |= {"clip_global": (images, 64), "clip_global_frozen": (images, 64)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


def labels(images: int = 2) -> torch.Tensor:
    """Classes 0 and 2 and unlabelled pixels; the first image lacks class 2."""
    torch.manual_seed(3)
    found = torch.randint(0, 2, (images, 64, 64)) * 2
    found[:, :8] = 255
    found[0][found[0] == 2] = 0
    return found


def attention(q, k, v, parts, heads):
    """Softmax attention of one image by hand; parts: (weight, bias) of query, key, value, out."""
    (wq, bq), (wk, bk), (wv, bv), (wo, bo) = parts
    q, k, v = q @ wq.T + bq, k @ wk.T + bk, v @ wv.T + bv
    size = q.shape[1] // heads
    found = []
    for h in range(heads):
        part = slice(h * size, (h + 1) * size)
        weights = (q[:, part] @ k[:, part].T / math.sqrt(size)).softmax(-1)
        found.append(weights @ v[:, part])
    return torch.cat(found, 1) @ wo.T + bo


def parts_of(module: nn.MultiheadAttention):
    weights = module.in_proj_weight.chunk(3)
    biases = [0, 0, 0] if module.in_proj_bias is None else module.in_proj_bias.chunk(3)
    out = module.out_proj
    return [*zip(weights, biases, strict=True), (out.weight, out.bias)]


def test_refinement_is_the_published_decoder():
    torch.manual_seed(0)
    refinement = TextRefinement(12, 8, heads=2, layers=2).double().eval()
    for parameter in refinement.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    text, image = torch.randn(2, 3, 12).double(), torch.randn(2, 5, 12).double()
    expected = []
    for t, v in zip(text, image, strict=True):
        x, memory = refinement.text_input(t), refinement.image_input(v)
        for layer in refinement.layers:
            y = layer.norm1(x)
            x = x + attention(y, y, y, parts_of(layer.self_attn), 2)
            x = x + attention(layer.norm2(x), memory, memory, parts_of(layer.multihead_attn), 2)
            x = x + layer.linear2(F.gelu(layer.linear1(layer.norm3(x))))
        expected.append(refinement.output(x))
    torch.testing.assert_close(refinement(text, image), torch.stack(expected))


def test_training_drops_values_in_the_refinement_but_no_attention():
    refinement = TextRefinement(12, 8, heads=2).train()
    text, image = torch.randn(1, 3, 12), torch.randn(1, 5, 12)
    assert not torch.equal(refinement(text, image), refinement(text, image))
    for module in refinement.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    assert torch.equal(refinement(text, image), refinement(text, image))


def test_prompts_are_start_learned_tokens_name_and_end():
    torch.manual_seed(0)
    tower = TextTower("tiny", "random").double()
    names = ["road", "traffic light", "sky"]
    prompts = ClassPrompts(tower, names, 8).double()
    assert prompts.tokens.shape == (3, 4) and prompts.context.shape == (8, 32)
    ids = tower.tokenize(names)
    expected = []
    for row, words in zip(ids, (1, 2, 1), strict=True):
        start, rest = tower.embed(row[:1]), tower.embed(row[1 : 2 + words])
        prompt = torch.cat([start, prompts.context, rest])[None]
        expected.append(tower.encode(prompt, torch.tensor([8 + 1 + words]))[0])
    torch.testing.assert_close(prompts(), torch.stack(expected))
    anchors = tower.encode_texts([f"a clean origami of a {name}" for name in names])
    torch.testing.assert_close(prompts.anchors(), anchors)
    torch.testing.assert_close(ClassPrompts(tower, names, 0)(), tower.encode_texts(names))
    prompts().sum().backward()
    assert prompts.context.grad.abs().min() > 0
    with raises(ValueError, match="CONTEXT_TOKENS 75 makes prompts of 79 tokens, .* reads 77"):
        ClassPrompts(tower, names, 75)


def test_text_is_refined_by_the_global_token_and_the_patches(head):
    given = features()
    got = head.refined_text(given["clip_global"], given["clip_dense"])
    for image in range(2):
        tokens = [given["clip_global"][image]]
        tokens += [given["clip_dense"][image, :, i, j] for i in range(4) for j in range(4)]
        text = head.prompts()
        change = head.refinement(text[None], torch.stack(tokens)[None])[0]
        torch.testing.assert_close(got[image], text + head.gamma * change)


def test_cells_attend_to_the_text_between_norm_and_feed_forward(head):
    decoder = head.pixel_decoder
    (layer,) = decoder.encoder.layers
    text = torch.randn(1, 3, 64, dtype=torch.float64)
    values = decoder.text_projection(text)[0]
    keys = values + decoder.text_positions.weight
    cells, positions = torch.randn(2, 1, 4 + 1 + 1, 32, dtype=torch.float64)
    sizes = [(2, 2), (1, 1), (1, 1)]
    others = {
        "position_embeddings": positions,
        "reference_points": torch.rand(1, 6, 3, 2, dtype=torch.float64),
        "spatial_shapes_list": sizes,
        "level_start_index": torch.tensor([0, 4, 5]),
        "output_attentions": False,
    }
    mask = torch.zeros(1, 6, dtype=torch.bool)
    deformed, _ = layer.self_attn(cells, mask, cells, mask, **others)
    x = layer.self_attn_layer_norm(cells + deformed)[0]
    seen = attention(x + positions[0], keys, values, parts_of(layer.text_attn), 4)
    x = layer.text_attn_layer_norm(x + seen)
    x = layer.final_layer_norm(x + layer.fc2(layer.fc1(x).relu()))
    layer.text = (keys[None], values[None])
    torch.testing.assert_close(layer(cells, mask, **others)[0][0], x)
    layer.text = None
    with raises(RuntimeError, match="has no text"):
        layer(cells, mask, **others)


def test_the_decoder_is_transformers_with_queries_of_the_text(head):
    transformer, text = head.transformer, torch.randn(1, 3, 64, dtype=torch.float64)
    theirs = Mask2FormerTransformerModule(32, transformer.decoder.config).double().eval()
    missing = theirs.load_state_dict(transformer.state_dict(), strict=False)
    assert missing.missing_keys == ["queries_features.weight"]
    assert {key.split(".")[0] for key in missing.unexpected_keys} == {"text_projection"}
    theirs.queries_features.weight.data = transformer.text_projection(text)[0]
    maps = [torch.randn(1, 32, side, side, dtype=torch.float64) for side in (2, 4, 8)]
    masks = torch.randn(1, 32, 16, 16, dtype=torch.float64)
    got, expected = transformer(maps, masks, text), theirs(maps, masks)
    for key in ("intermediate_hidden_states", "masks_queries_logits"):
        for one, other in zip(got[key], expected[key], strict=True):
            torch.testing.assert_close(one, other)


def test_the_neck_makes_a_pyramid():
    torch.manual_seed(0)
    neck = PatchNeck(32, "GN").double()
    maps = [torch.randn(1, 32, 5, 6, dtype=torch.float64) for _ in range(4)]
    quarter, half, whole, double = neck(maps)
    assert [x.shape[-2:] for x in (quarter, half, whole, double)] == [
        (20, 24),
        (10, 12),
        (5, 6),
        (3, 3),
    ]
    weight, bias = neck.to_half.weight, neck.to_half.bias
    cell = torch.einsum("c,cd->d", maps[1][0, :, 2, 3], weight[:, :, 1, 0]) + bias
    torch.testing.assert_close(half[0, :, 2 * 2 + 1, 2 * 3 + 0], cell)
    first, norm, _, last = neck.to_quarter
    torch.testing.assert_close(quarter, last(F.gelu(norm(first(maps[0])))))
    assert whole is maps[2]
    assert torch.equal(double[..., 2, 2], maps[3][..., 4, 4:].amax(-1))


def test_query_c_predicts_class_c_or_nothing(head):
    targets = SegmentationTargets(labels(), present_classes(list(labels()), 3, 255))
    predictions = head.predict(features())
    losses = head.losses(predictions, targets)
    for k, suffix in enumerate(["_0", "_1", ""]):
        total = weight = 0.0
        for image, present in enumerate([{0}, {0, 2}]):
            for query in range(3):
                wanted = query if query in present else 3
                share = 0.1 if wanted == 3 else 1.0
                log = predictions[k][0][image, query].float().log_softmax(-1)
                total, weight = total - share * float(log[wanted]), weight + share
        assert float(losses[f"loss_ce{suffix}"]) == approx(2 * total / weight, rel=1e-5)
    matched = head.criterion.match(
        {"": predictions[-1], "_0": predictions[0]}, [], [torch.tensor([0]), torch.tensor([0, 2])]
    )
    assert [[(q.tolist(), m.tolist()) for q, m in images] for images in matched] == [
        [([0], [0]), ([0, 2], [0, 1])]
    ] * 2


def test_predictions_that_are_not_finite_are_named(head):
    predictions = head.predict(features())
    predictions[1] = (predictions[1][0] * float("nan"), predictions[1][1])
    with raises(FloatingPointError, match="class logits_1"):
        head.losses(predictions, labels())


def test_a_mask_has_a_quarter_of_a_patch(head, model):
    """The stride says which cells cover the image, when labels are drawn from the model."""
    assert head.stride == model.backbone.patch_size / 4
    _, masks = head.predict(features(side=4))[-1]
    assert masks.shape[-2:] == (16, 16)


def test_a_mask_is_compared_with_that_of_its_own_class(head):
    """The mask loss of query 2 does not depend on the mask of query 0."""
    targets = SegmentationTargets(labels(1) * 0 + 2, [torch.tensor([2])])
    predictions = head.predict(features(1))
    predictions[-1][1].retain_grad()
    head.losses(predictions, targets)["loss_mask"].backward()
    moved = predictions[-1][1].grad.abs().sum((0, 2, 3)) > 0
    assert moved.tolist() == [False, False, True]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_regularisations_are_the_published_ones():
    torch.manual_seed(0)
    text, anchors = torch.randn(2, 3, 8).double(), torch.randn(3, 8).double()
    patches, image, public = torch.randn(2, 8, 4, 4).double(), *torch.randn(2, 2, 8).double()
    found = []
    for b in range(2):
        for c in range(3):
            scores = torch.tensor([cosine(text[b, c], anchor) for anchor in anchors])
            found.append(-float(scores.double().log_softmax(0)[c]))
    assert float(text_losses.language_loss(text, anchors)) == approx(sum(found) / 6, rel=1e-6)
    squares = [float((image[b, e] - public[b, e]) ** 2) for b in range(2) for e in range(8)]
    assert float(text_losses.vision_loss(image, public)) == approx(sum(squares) / 16)
    target, found = labels()[:, ::16, ::16], []
    for b, i, j in (target != 255).nonzero().tolist():
        scores = [cosine(patches[b, :, i, j], each) / 0.07 for each in text[b]]
        found.append(-float(torch.tensor(scores).double().log_softmax(0)[target[b, i, j]]))
    got = text_losses.vision_language_loss(patches, text, target, 255)
    assert float(got) == approx(sum(found) / len(found), rel=1e-6)
    assert float(text_losses.vision_language_loss(patches, text, target * 0 + 255, 255)) == 0


def test_losses_of_parts_add_up_to_those_of_the_batch(head):
    targets = SegmentationTargets(labels(), present_classes(list(labels()), 3, 255))
    predictions = head.predict(features())
    whole = head.losses(predictions, targets)
    names = ["loss_language", "loss_vision", "loss_vision_language"]
    assert {*names, "loss_ce", "loss_ce_0", "loss_dice_1"} < {*whole} and len(whole) == 12
    divisors = head.loss_divisors(list(labels()))
    images = [{name: value[k : k + 1] for name, value in features().items()} for k in range(2)]
    for name in [*names, "loss_ce"]:
        total = 0.0
        for image, alone in enumerate(images):
            own = head.losses(head.predict(alone), targets.of_image(image))
            total += own[name] * head.loss_divisors([labels()[image]])[name] / divisors[name]
        torch.testing.assert_close(total, whole[name])
    torch.manual_seed(4)
    one = head.loss_of_image(predictions, targets, 1)
    torch.manual_seed(4)
    own = head.losses(head.predict(images[1]), targets.of_image(1))
    del own["loss_vision"]  # which says nothing about the labels
    torch.testing.assert_close(one, sum(own.values()))


def test_weights_of_the_regularisations(head):
    targets = SegmentationTargets(labels(), present_classes(list(labels()), 3, 255))
    predictions = head.predict(features())
    before = head.losses(predictions, targets)
    head.regularisation |= {"loss_language": 3.0, "loss_vision": 0.0}
    after = head.losses(predictions, targets)
    torch.testing.assert_close(after["loss_language"], 3 * before["loss_language"])
    assert before.keys() - after.keys() == {"loss_vision"}
    without = {k: v for k, v in features().items() if k != "clip_global_frozen"}
    assert "loss_vision" not in head.losses(head.predict(without), targets)


def test_the_model_predicts_and_every_weight_of_the_decoder_trains(model):
    image = torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8)
    scores = model([{"image": image}])[0]["sem_seg"]
    assert scores.shape == (3, 50, 60) and scores.isfinite().all()
    model.train()
    batch = [{"image": image, "sem_seg": torch.randint(0, 3, (50, 60))}] * 2
    losses = model(batch)
    assert float(losses["loss_vision"]) == approx(0, abs=1e-10)  # the tower has not moved yet
    sum(losses.values()).backward()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        for name, loss in model(batch).items():  # masks are compared at random points
            assert float(loss) == approx(float(losses[name]), rel=0.3, abs=0.05), name
    frozen = frozen_parameters(model)
    assert len(frozen) == len([*model.sem_seg_head.prompts.tower.parameters()]) == 29
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {name for name, p in model.named_parameters() if p in frozen}


def test_counts_of_tqdm():
    cfg = config(TEXT_HEAD, MODEL__VFM__NAME="eva02_clip_vitl_336", MODEL__VFM__PATCH_SIZE=14)
    names = [f"class {k}" for k in range(19)]
    cfg = changed(cfg, ["MODEL.TEXT.CLASSES", names, "MODEL.SEM_SEG_HEAD.NORM", "SyncBN"])
    model = build_empty(cfg, VFMSegmentor)

    def millions(module: nn.Module) -> float:
        return sum(p.numel() for p in module.parameters()) / 1e6

    head = model.sem_seg_head
    assert millions(head.neck) == approx(12.59, abs=0.005)
    assert millions(head.refinement) == approx(3.75, abs=0.005)
    assert millions(head.prompts.tower) == approx(123.65, abs=0.005)
    assert millions(model) - millions(head.prompts.tower) == approx(344, abs=1)
    assert head.num_queries == 19


@mark.parametrize(
    "options, words",
    [
        ({"MODEL.VFM.OUT_FEATURES": [*BLOCKS, *CLIP[:2]]}, "and clip_global, clip_dense, clip_gl"),
        (
            {
                "MODEL.VFM.OUT_FEATURES": ["res2", "res3", "res4", "res5", *CLIP],
                "MODEL.SEM_SEG_HEAD.IN_FEATURES": ["res2", "res3", "res4", "res5"],
            },
            "needs four maps with one cell a patch",
        ),
        ({"MODEL.TEXT.CLASSES": ["sky"]}, "MODEL.TEXT.CLASSES has 1 names"),
        (  # whose embeddings have as many channels
            {"MODEL.VFM.NAME": "eva02_clip_vitl", "MODEL.TEXT.NAME": "eva02_clip_vitl_336"},
            "VFM.NAME eva02_clip_vitl and MODEL.TEXT.NAME eva02_clip_vitl_336 are not the towers "
            "of one CLIP model, .* set both to one of eva02_clip_vitl, eva02_clip_vitl_336, tiny$",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused(tiny_head, options, words):
    with raises(ValueError, match=words):
        build_empty(config(tiny_head | TEXT_HEAD | TINY | options), VFMSegmentor)


def test_a_loss_without_a_weight_needs_no_public_tower(tiny_head):
    options = {"MODEL.VFM.OUT_FEATURES": [*BLOCKS, *CLIP[:2]], "MODEL.TEXT.VISION_WEIGHT": 0.0}
    model = VFMSegmentor(config(tiny_head | TEXT_HEAD | TINY | options))
    batch = [{"image": torch.zeros(3, 64, 64), "sem_seg": torch.zeros(64, 64, dtype=torch.int64)}]
    assert "loss_vision" not in model(batch)
