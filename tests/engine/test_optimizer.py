from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from detectron2.utils.events import EventStorage
from torch import nn

from fishertune_d2.config import default_config
from fishertune_d2.engine import LearningRates
from fishertune_d2.engine.optimizer import build_optimizer, carry_state
from fishertune_d2.fisher import Selection
from fishertune_d2.tuning import SelectedWeights


def _cfg(**solver):
    cfg = default_config()
    for key, value in {"BASE_LR": 0.1, "BACKBONE_MULTIPLIER": 0.5, **solver}.items():
        cfg.merge_from_list([f"SOLVER.{key}", value])
    return cfg


def _model() -> nn.Module:
    head = nn.ModuleDict(
        {
            "linear": nn.Linear(2, 2),
            "norm": nn.LayerNorm(2),
            "queries_features": nn.Embedding(3, 2),
        }
    )
    head.level_embed = nn.Parameter(torch.zeros(3, 2))
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "head": head})
    model.backbone.bias.requires_grad_(False)
    return model


def _rates_and_decays(cfg, model: nn.Module) -> dict[str, tuple[float, float]]:
    names = {p: name for name, p in model.named_parameters()}
    return {
        names[p]: (group["lr"], group["weight_decay"])
        for group in build_optimizer(cfg, model).param_groups
        for p in group["params"]
    }


@pytest.mark.parametrize("method", ["fishertune", "lora", "peft", "vpt"])
def test_the_context_of_prompts_decays_alike_with_every_method(method):
    """A warm-up is shared by methods, so it must not depend on them."""
    cfg, model = _cfg(), _model()
    cfg.TUNING.METHOD = method
    model.head["prompts"] = nn.Module()
    model.head["prompts"].context = nn.Parameter(torch.ones(2))
    assert _rates_and_decays(cfg, model)["head.prompts.context"] == (0.1, 0.0)


@pytest.mark.parametrize(
    ("method", "added"),
    [
        ("rein", {"rein.learnable_tokens_a": 0.0, "rein.scale": 0.0, "rein.merge": 0.05}),
        ("set", {"set.learnable_tokens2": 0.0, "set.scale": 0.0, "set.transform": 0.05}),
        ("vpt", {"vpt.prompts.0": 0.0}),
        ("vqt", {"vqt.prompts.0": 0.0, "vqt.weight": 0.05}),
        ("adaptformer", {"adaptformer.down.0": 0.05}),
        ("lora", {"q_proj.lora_A.default": 0.05}),
        ("soma", {"fc1.lora_A.default": 0.05, "fc1.base_layer.bias": 0.05}),
        ("peft", {"fc2.ia3_l.default": 0.0, "q_proj.lora_magnitude_vector.default": 0.0}),
        ("fishertune", {"prompts": 0.0, "own": 0.05}),  # a name that the method does not set
    ],
)
def test_added_parameters_decay_as_their_method_says(method, added):
    cfg, model = _cfg(), _model()
    cfg.TUNING.METHOD = method
    for name in added:
        *path, last = name.split(".")
        owner = model.backbone
        for part in path:
            owner.add_module(part, owner := getattr(owner, part, nn.Module()))
        owner.register_parameter(last, nn.Parameter(torch.ones(2)))
    found = _rates_and_decays(cfg, model)
    assert {name: found[f"backbone.{name}"] for name in added} == {
        name: (0.05, decay) for name, decay in added.items()
    }


def test_rates_and_decays_of_each_part():
    assert _rates_and_decays(_cfg(), _model()) == {
        "backbone.weight": (0.05, 0.05),
        "head.linear.weight": (0.1, 0.05),
        "head.linear.bias": (0.1, 0.05),
        "head.norm.weight": (0.1, 0.0),
        "head.norm.bias": (0.1, 0.0),
        "head.queries_features.weight": (0.1, 0.0),
        "head.level_embed": (0.1, 0.0),
    }


def test_biases_have_their_own_rate_and_decay():
    model = _model()
    model.backbone.bias.requires_grad_(True)
    before = _rates_and_decays(_cfg(), model)
    after = _rates_and_decays(_cfg(BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.01), model)
    biases = {"backbone.bias": 0.1, "head.linear.bias": 0.2, "head.norm.bias": 0.2}
    assert after == before | {name: (rate, 0.01) for name, rate in biases.items()}
    assert _rates_and_decays(_cfg(BIAS_LR_FACTOR=1.0), model) == before


def test_selected_biases_have_the_rate_and_decay_of_biases():
    model = _model()
    scores = {name: torch.rand(p.shape) for name, p in model.backbone.named_parameters()}
    SelectedWeights(model.backbone, Selection.from_scores(scores, 1.0, 6))
    before = _rates_and_decays(_cfg(), model)
    after = _rates_and_decays(_cfg(BIAS_LR_FACTOR=2.0, WEIGHT_DECAY_BIAS=0.01), model)
    weight, bias = (f"backbone.parametrizations.{name}.0.values" for name in ("weight", "bias"))
    assert before[weight] == before[bias] == after[weight] == (0.05, 0.05)
    assert after[bias] == (0.1, 0.01)


def test_the_logged_rates_are_those_of_the_weights():
    model, hook = _model(), LearningRates()
    model.backbone.bias.requires_grad_(True)
    optimizer = build_optimizer(_cfg(BIAS_LR_FACTOR=2.0), model)
    with EventStorage() as storage:
        hook.trainer = SimpleNamespace(
            model=model, optimizer=optimizer, storage=storage, scheduler=Mock()
        )
        hook.after_step()
        assert {name: rate for name, (rate, _) in storage.latest().items()} == {
            "lr": 0.1,
            "lr_backbone": 0.05,
        }


def test_sgd_takes_nesterovs_momentum():
    assert build_optimizer(_cfg(OPTIMIZER="SGD", NESTEROV=True), _model()).defaults["nesterov"]
    assert not build_optimizer(_cfg(OPTIMIZER="SGD"), _model()).defaults["nesterov"]


def test_moments_are_carried_over():
    model = _model()
    old = build_optimizer(_cfg(), model)
    model.head.linear(torch.ones(1, 2)).sum().backward()
    old.step()
    model.backbone.bias.requires_grad_(True)
    new = build_optimizer(_cfg(), model)
    carry_state(old, new)
    weight = model.head.linear.weight
    assert torch.equal(new.state[weight]["exp_avg"], old.state[weight]["exp_avg"])
    assert model.backbone.bias not in new.state


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_full_model_clipping_scales_all_gradients_together(power):
    model = _model()
    clip = {"ENABLED": True, "CLIP_TYPE": "full_model", "CLIP_VALUE": 0.5, "NORM_TYPE": power}
    options = {f"CLIP_GRADIENTS.{key}": value for key, value in clip.items()}
    optimizer = build_optimizer(_cfg(OPTIMIZER="SGD", MOMENTUM=0.0, **options), model)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.ones_like(p)
    optimizer.step()
    norm = sum(float((p.grad**power).sum()) for p in parameters) ** (1 / power)
    assert norm == pytest.approx(0.5, rel=1e-4)


def test_refuses_an_unknown_optimizer():
    with pytest.raises(ValueError, match="SOLVER.OPTIMIZER is 'LION': choose from ADAMW, SGD"):
        build_optimizer(_cfg(OPTIMIZER="LION"), _model())
