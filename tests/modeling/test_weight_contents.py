"""Weights beside others in one file, in unusual places, and those that are no weights to train."""

import logging

import timm
import torch
from pytest import fixture, mark, raises
from safetensors.torch import save_file

from fishertune_d2.modeling.public_weights import load_vfm_weights


def tiny_vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, img_size=32)


@fixture
def state():
    return tiny_vit().state_dict()


@fixture
def loaded(tmp_path):
    """Returns a function that loads what is given from a file of PyTorch's."""

    def load(content):
        vit = tiny_vit(seed=1)
        torch.save(content, tmp_path / "x.pth")
        load_vfm_weights(vit, str(tmp_path / "x.pth"))
        return dict(vit.state_dict())

    return load


def assert_same(got, expected):
    torch.testing.assert_close(got, dict(expected), rtol=0, atol=0)


@mark.parametrize(
    "way",
    ["model_state_dict", "model_state", "net", "student", "teacher/model", "model/teacher/module"],
)
def test_nested_weights_are_found(loaded, state, way):
    content = state
    for nest in reversed(way.split("/")):
        content = {nest: content, "epoch": 3}
    assert_same(loaded(content), state)


@mark.parametrize(
    "prefix", ["student.", "base_model.", "base_model.model.", "net.", "ema.", "backbone.0."]
)
def test_whatever_wraps_the_only_encoder_is_taken_off(loaded, state, prefix):
    assert_same(loaded({prefix + name: value for name, value in state.items()}), state)


def test_the_only_encoder_with_more_inside_is_refused(loaded, state):
    """As of a model with adapters, whose weights alone are not those of the model."""
    content = {f"base_model.model.{name}": value for name, value in state.items()}
    with raises(ValueError, match="Unexpected: blocks.0.attn.qkv.lora_A"):
        loaded(content | {"base_model.model.blocks.0.attn.qkv.lora_A": torch.zeros(2)})


@mark.parametrize(
    ("raw", "ema"),
    [
        ("model", "model_ema"),
        ("state_dict", "state_dict_ema"),
        ("state_dict", "ema_state_dict"),
        ("model.", "model_ema."),
        ("backbone.", "ema.backbone."),
    ],
)
def test_a_moving_average_beside_the_weights_is_named(loaded, state, caplog, raw, ema):
    copy = {name: torch.zeros_like(value) for name, value in state.items()}
    if raw.endswith("."):
        content = {raw + name: value for name, value in state.items()}
        content |= {ema + name: value for name, value in copy.items()}
    else:
        content = {raw: state, ema: copy}
    with caplog.at_level(logging.WARNING):
        assert_same(loaded(content), state)
    (text,) = [text for text in caplog.messages if "moving average" in text]
    assert f"'{ema.split('.')[0]}'" in text and "not taken" in text


def test_no_moving_average_is_no_warning(loaded, state, caplog):
    with caplog.at_level(logging.WARNING):
        loaded({"model": state, "optimizer": {}, "schema": {}})
    assert caplog.messages == []


@mark.parametrize("value", [float("nan"), float("inf")])
@mark.parametrize("name", ["pos_embed", "blocks.0.attn.qkv.weight"])
def test_weights_that_are_no_numbers_are_refused(loaded, state, name, value):
    state[name].flatten()[3] = value
    with raises(ValueError, match=rf"{name} holds NaN or infinity.*x\.pth"):
        loaded(state)


@mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64])
def test_whole_numbers_are_refused_as_weights(tmp_path, state, dtype):
    name = "blocks.0.mlp.fc1.weight"
    save_file(state | {name: (state[name] * 127).to(dtype)}, tmp_path / "x.safetensors")
    with raises(ValueError, match=rf"{name} holds {dtype}.*quantised"):
        load_vfm_weights(tiny_vit(), str(tmp_path / "x.safetensors"))
