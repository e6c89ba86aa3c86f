"""Rein, and what SET shares with it: tokens after every block that are the decoder's queries."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fishertune_d2.config import default_config, read_config
from fishertune_d2.engine.parameter_counts import build_empty
from fishertune_d2.tuning import build_tuning_method

from ..conftest import DEVICE
from .conftest import FAMILIES, naively_refined

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
IMAGES = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
both = pytest.mark.parametrize("name", ["rein", "set"])


def attached(cfg, model) -> dict[str, nn.Parameter]:
    """What is trained of the backbone, by name; everything else of it is frozen."""
    method = build_tuning_method(cfg)
    assert method.adds and not method.selects
    torch.manual_seed(1)
    method.attach(model.backbone, model.sem_seg_head)
    parameters = method.parameters(model.backbone)
    model.backbone.requires_grad_(False)
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def batch(count: int = 2) -> list[dict]:
    generator = torch.Generator().manual_seed(2)
    return [
        {
            "image": torch.randint(0, 256, (3, 48, 64), generator=generator).float(),
            "sem_seg": torch.randint(0, 3, (48, 64), generator=generator),
        }
        for _ in range(count)
    ]


def published_change(patch: Tensor, tokens: Tensor, p: dict[str, Tensor]) -> Tensor:
    """One patch f (D,), the tokens T (m, D) of one block: W_f (S[1:] (T[1:] W_T) + f)."""
    scores = [sum(f * t for f, t in zip(patch, token, strict=True)) for token in tokens]
    weights = [(score / len(patch) ** 0.5).exp() for score in scores]
    total = patch.clone()
    for weight, token in list(zip(weights, tokens, strict=True))[1:]:
        said = p["mlp_token2feat.weight"] @ token + p["mlp_token2feat.bias"]
        total += weight / sum(weights) * said
    return p["mlp_delta_f.weight"] @ total + p["mlp_delta_f.bias"]


@pytest.mark.parametrize("vfm", FAMILIES)
def test_patches_are_changed_as_published(segmentor, vfm):
    cfg, model = segmentor("rein", vfm)
    model.double()
    frozen = deepcopy(model.backbone)
    p = {n.removeprefix("rein."): v.data for n, v in attached(cfg, model).items()}
    p["scale"].fill_(0.3)

    def change(patch: Tensor, block: int) -> Tensor:
        tokens = p["learnable_tokens_a"][block] @ p["learnable_tokens_b"][block]
        return 0.3 * published_change(patch, tokens, p)

    with torch.no_grad():
        naive, images = naively_refined(frozen, change), IMAGES.double()
        expected, maps, plain = naive(images), model.backbone(images), frozen(images)
    for level, values in maps.items():
        torch.testing.assert_close(values, expected[level], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(values, plain[level], rtol=0.1)


def test_tokens_are_initialised_as_published(segmentor):
    cfg, model = segmentor("rein")
    parameters = attached(cfg, model)
    bound = (6 / (3 * 16**2 + (32 * 16) ** 0.5)) ** 0.5
    for part in ("a", "b"):
        tokens = parameters[f"rein.learnable_tokens_{part}"]
        assert 0.98 * bound < tokens.abs().max() <= bound
    assert parameters["rein.scale"].item() == pytest.approx(1e-3)


def test_queries_are_computed_as_published(segmentor):
    cfg, model = segmentor("rein")
    model.double()
    p = {n.removeprefix("rein."): v.data for n, v in attached(cfg, model).items()}
    head = model.sem_seg_head
    tokens = p["learnable_tokens_a"] @ p["learnable_tokens_b"]  # (L, m, D)
    for query in range(8):
        rows = [p["transform.weight"] @ block[query] + p["transform.bias"] for block in tokens]
        joined = []
        for channel in range(32):
            values = [row[channel] for row in rows]
            joined += [max(values), sum(values) / len(values), values[-1]]
        expected = p["merge.weight"] @ torch.stack(joined) + p["merge.bias"]
        torch.testing.assert_close(head.transformer.queries_embedder.weight[query], expected)
        features = head.querys2feat.weight @ expected + head.querys2feat.bias
        torch.testing.assert_close(head.transformer.queries_features.weight[query], features)


@pytest.mark.parametrize(("name", "count"), [("rein", 2_990_081), ("set", 7_546_881)])
def test_count_on_vit_l(name, count):
    cfg = default_config()
    cfg.TUNING.METHOD = name
    model = build_empty(cfg, build_model)
    before, method = model.state_dict().keys(), build_tuning_method(cfg)
    decoder = sum(p.numel() for p in model.sem_seg_head.parameters())
    method.attach(model.backbone, model.sem_seg_head)
    parameters = method.parameters(model.backbone)
    assert sum(p.numel() for p in parameters.values()) == count
    # querys2feat in place of 100 learned query embeddings and as many features
    after = sum(p.numel() for p in model.sem_seg_head.parameters())
    assert after - decoder == 256 * 256 + 256 - 2 * 100 * 256
    own = {f"backbone.{n}" for n in parameters}
    gone = {f"sem_seg_head.transformer.queries_{n}.weight" for n in ("embedder", "features")}
    new = {f"sem_seg_head.querys2feat.{n}" for n in ("weight", "bias")}
    assert model.state_dict().keys() == (before - gone) | own | new


@both
def test_a_model_starts_close_to_the_frozen_one(segmentor, name):
    cfg, model = segmentor(name)
    with torch.no_grad():
        frozen = model.backbone(IMAGES)
        attached(cfg, model)
        for level, values in model.backbone(IMAGES).items():
            difference = (values - frozen[level]).norm() / frozen[level].norm()
            assert 1e-5 < difference < 1e-2


@both
@pytest.mark.parametrize("vfm", FAMILIES)
def test_gradients_reach_what_was_added_and_nothing_else(segmentor, name, vfm):
    cfg, model = segmentor(name, vfm)
    parameters = attached(cfg, model)
    sum(model(batch()).values()).backward()
    for parameter_name, parameter in model.backbone.named_parameters():
        if parameter_name in parameters:
            assert parameter.grad.isfinite().all() and parameter.grad.any()
        else:
            assert parameter.grad is None
    assert all(p.grad is not None for p in model.sem_seg_head.parameters())


def test_only_tokens_move_the_queries(segmentor):
    cfg, model = segmentor("rein")
    head = model.sem_seg_head
    with torch.no_grad():
        features = model.backbone(IMAGES)
        parameters = attached(cfg, model)
        before = [head.transformer.queries_embedder.weight, head.predict(features)[0][0]]
        parameters["rein.learnable_tokens_a"] += 1
        after = [head.transformer.queries_embedder.weight, head.predict(features)[0][0]]
    assert not torch.allclose(before[0], after[0]) and not torch.allclose(before[1], after[1])


@both
def test_a_deep_copy_has_tokens_of_its_own(segmentor, name):
    cfg, model = segmentor(name)
    attached(cfg, model)
    copy = deepcopy(model)

    def outputs(segmentor) -> list[Tensor]:
        queries = segmentor.sem_seg_head.transformer
        with torch.no_grad():
            maps = segmentor.backbone(IMAGES)["res5"]
        return [queries.queries_embedder.weight, queries.queries_features.weight, maps]

    before = outputs(model)
    for now, then in zip(outputs(copy), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    getattr(copy.backbone, name).learnable_tokens_a.data += 1
    for copied, original, then in zip(outputs(copy), outputs(model), before, strict=True):
        assert not torch.allclose(copied, then)
        torch.testing.assert_close(original, then, rtol=0, atol=0)


@both
def test_tokens_are_named_once(segmentor, name):
    cfg, model = segmentor(name)
    parameters = attached(cfg, model)
    names = [n for n, _ in model.named_parameters(remove_duplicate=False)]
    assert len(names) == len(list(model.named_parameters()))
    held = [n for n in model.state_dict() if name in n.split(".")]
    assert sorted(held) == sorted(f"backbone.{n}" for n in parameters)


@both
def test_a_state_dict_carries_everything(segmentor, name):
    def scores(model) -> Tensor:
        return model.eval()(batch(1))[0]["sem_seg"]

    (cfg, model), (_, other) = segmentor(name), segmentor(name)
    for each in (model, other):
        attached(cfg, each)
    for parameter in other.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(scores(model), scores(other))
    model.load_state_dict(other.state_dict())
    torch.testing.assert_close(scores(model), scores(other), rtol=0, atol=0)


@both
def test_ddp_waits_for_no_parameter(segmentor, name, tmp_path):
    cfg, model = segmentor(name)
    attached(cfg, model)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        wrapped = DistributedDataParallel(model)
        for _ in range(2):  # the second pass raises if a gradient of the first is missing
            sum(wrapped(batch()).values()).backward()
    finally:
        torch.distributed.destroy_process_group()


@both
def test_half_precision_stops_at_the_queries(segmentor, name):
    cfg, model = segmentor(name)
    attached(cfg, model)
    with torch.autocast("cpu", torch.bfloat16):
        transformer = model.sem_seg_head.transformer
        assert transformer.queries_embedder.weight.dtype == torch.float32
        assert transformer.queries_features.weight.dtype == torch.float32
        assert all(loss.isfinite() for loss in model(batch()).values())


@both
def test_tokens_cannot_be_merged(segmentor, name):
    cfg, model = segmentor(name)
    attached(cfg, model)
    with pytest.raises(
        ValueError,
        match=f"TUNING.METHOD {name} cannot be merged: its change of a patch depends on the patch",
    ):
        build_tuning_method(cfg).merge(model.backbone)


def test_a_head_without_queries_is_refused(segmentor):
    cfg, model = segmentor("rein")
    with pytest.raises(ValueError, match="Linear has no learned queries.*Mask2FormerHead"):
        build_tuning_method(cfg).attach(model.backbone, nn.Linear(1, 1))


@pytest.mark.parametrize("path", ["camvid/rein", "camvid/set", "rein_dinov2"])
def test_configs_train_tokens_as_their_authors(path):
    cfg, text = read_config(str(CONFIGS / f"{path}.yaml")), (CONFIGS / f"{path}.yaml").read_text()
    assert cfg.TUNING.METHOD in path and cfg.OUTPUT_DIR == f"outputs/{path}"
    assert f"python train_net.py --config-file configs/{path}.yaml" in text
    # As fast as the decoder, but where a search chose (tests/bench/test_results.py).
    assert path.startswith("camvid/") or cfg.SOLVER.BACKBONE_MULTIPLIER == 1
    assert cfg.SOLVER.WEIGHT_DECAY_EMBED == 0
