"""What scoring takes from the config: precision, and how images reach the model."""

import json
from pathlib import Path

import pytest
import torch
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.engine import Trainer, loaders
from fishertune_d2.engine.scoring import score_datasets
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.run import Results, require_same_protocol


def _as_if_trained(cfg) -> nn.Module:
    """The model of a config, whose random weights may be scored."""
    model = build_model(cfg)
    model.load_state_dict(model.state_dict())
    return model


@pytest.mark.parametrize(
    ("options", "seen", "recorded"),
    [
        ({}, None, None),
        ({"SOLVER__AMP__ENABLED": True}, torch.bfloat16, "bfloat16"),
        (
            {"SOLVER__AMP__ENABLED": True, "SOLVER__AMP__PRECISION": "float16"},
            torch.float16,
            "float16",
        ),
        ({"SOLVER__MATMUL_PRECISION": "high"}, None, "float32, high matrix products"),
    ],
)
def test_a_model_is_scored_in_the_precision_of_its_training(tiny_cfg, options, seen, recorded):
    cfg = tiny_cfg(**options, TEST__PICTURES=0)
    model, dtypes = _as_if_trained(cfg), set()

    def record(module, inputs):
        kind = module.device.type
        enabled = torch.is_autocast_enabled(kind)
        dtypes.add(torch.get_autocast_dtype(kind) if enabled else None)

    model.register_forward_pre_hook(record)
    try:
        score_datasets(cfg, model)
        assert torch.get_float32_matmul_precision() == cfg.SOLVER.MATMUL_PRECISION
        tf32 = cfg.SOLVER.MATMUL_PRECISION != "highest"
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = False  # as tests/conftest.py sets it
    assert dtypes == {seen}
    assert not torch.is_autocast_enabled(model.device.type)
    results = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    assert results["protocol"].get("precision") == recorded


def test_a_finished_run_is_scored_under_another_protocol(tiny_cfg, finished_run):
    found = {}
    for name in ("", "tqdm", "native"):
        cfg = tiny_cfg(f"under_{name}", TEST__PROTOCOL=name, TEST__PICTURES=0)
        Trainer.test(cfg, build_trained(cfg, str(finished_run / "model_final.pth")))
        found[name] = Results.read(Path(cfg.OUTPUT_DIR) / "results.json")
    assert found["tqdm"].protocol.items() >= {"name": "tqdm", "class_rule": "union"}.items()
    assert found["native"].protocol.items() >= {"name": "native", "class_rule": "present"}.items()
    assert "name" not in found[""].protocol and found[""].protocol_name == "native"
    assert found[""].scores == found["native"].scores
    require_same_protocol([found[""], found["native"]], vary=())
    with pytest.raises(ValueError, match=r"the protocol's name \(tqdm and native\)"):
        require_same_protocol([found["native"], found["tqdm"]], vary=())


def test_images_are_pinned_for_a_gpu_alone(tiny_cfg, monkeypatch):
    cfg = tiny_cfg(MODEL__DEVICE="cpu", TEST__PICTURES=0)
    initialised = torch.cuda.is_initialized()  # by another test, on a machine with a GPU
    assert not Trainer.build_train_loader(cfg).pin_memory
    assert Trainer.build_train_loader(tiny_cfg(MODEL__DEVICE="cuda:0")).pin_memory

    pinned, build = [], loaders.build_test_loader

    def recorded(*args, pin_memory: bool, **kwargs):
        pinned.append(pin_memory)
        return build(*args, **kwargs)

    monkeypatch.setattr(loaders, "build_test_loader", recorded)
    score_datasets(cfg, _as_if_trained(cfg))
    assert pinned == [False, False]
    assert torch.cuda.is_initialized() == initialised


def test_a_model_that_lacks_what_was_loaded_into_it_is_not_scored(tiny_cfg):
    cfg = tiny_cfg(TEST__PICTURES=0)
    model = build_model(cfg)
    state = model.state_dict() | {"backbone.vit.prompts": torch.zeros(2)}
    model.load_state_dict(state, strict=False)
    with pytest.raises(
        ValueError, match=r"\(1, the first is backbone.vit.prompts\).*build_trained.*--eval-only"
    ):
        score_datasets(cfg, model)
    with pytest.raises(ValueError, match=r"as they were initialised.*build_trained"):
        score_datasets(cfg, build_model(cfg))
