"""Which tensors of a segmentor are still as they were initialised."""

import copy
import logging
import re

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import nn

from .test_segmentor import build, label, photo


def _batch():
    return [{"image": photo(64, 64), "sem_seg": label(64, 64)}]


def _decoder(model):
    return {name for name in model.state_dict() if name.startswith("sem_seg_head.")}


def test_a_new_model_has_an_untrained_decoder_and_the_backbones_own_weights():
    model = build()
    assert _decoder(model) and model.untrained == _decoder(model)
    assert copy.deepcopy(model).untrained == model.untrained


class _Parent(nn.Module):
    """Holds the model under a name, as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda model: model, _Parent])
def test_a_load_leaves_what_it_does_not_fill(wrap):
    model = build()
    state = wrap(build()).state_dict()
    missing = [
        name
        for name in state
        if name.endswith(("class_predictor.weight", "backbone.convs.res3.bias"))
    ]
    assert len(missing) == 2
    part = {name: value for name, value in state.items() if name not in missing}
    wrap(model).load_state_dict(part, strict=False)
    assert model.untrained == {name.removeprefix("module.") for name in missing}
    # The rest comes from another file.
    wrap(model).load_state_dict({name: state[name] for name in missing}, strict=False)
    assert model.untrained == frozenset()


def test_a_load_of_the_backbone_alone_leaves_the_decoder_untrained():
    model = build()
    state = {n: v for n, v in build().state_dict().items() if n.startswith("backbone.")}
    model.load_state_dict(state, strict=False)
    assert model.untrained == _decoder(model)


def test_what_a_checkpointer_leaves_out_for_its_shape_is_untrained(tmp_path):
    state = build().state_dict()
    name = "sem_seg_head.class_predictor.bias"
    torch.save({"model": state | {name: torch.zeros(77)}}, tmp_path / "other.pth")
    model = build()
    DetectionCheckpointer(model).load(str(tmp_path / "other.pth"))
    assert model.untrained == {name}


def test_a_training_step_trains_and_nothing_else_does():
    model = build()
    everything = model.untrained
    with torch.no_grad():
        model(_batch())
    model.eval()
    model(_batch())
    model.losses(_batch())
    model.train()
    model.features_and_targets(_batch())  # an estimate reads these and computes its own losses
    assert model.untrained == everything
    model(_batch())
    assert model.untrained == frozenset()


PROMPT = "backbone.prompts"


@pytest.mark.parametrize("wrap", [lambda model: model, _Parent])
def test_a_load_that_brings_more_than_the_model_has_is_noted(wrap):
    model, prefix = build(), "" if wrap is not _Parent else "module."
    state = wrap(build()).state_dict()
    constants = {  # of another place, and not of the state dict
        f"{prefix}sem_seg_head.criterion.empty_weight": torch.ones(4),
        f"{prefix}pixel_mean": torch.zeros(3, 1, 1),
        "optimizer": torch.zeros(1),
    }
    wrap(model).load_state_dict(state | constants, strict=False)
    assert model.unplaced == frozenset()
    wrap(model).load_state_dict(state | {prefix + PROMPT: torch.zeros(2)}, strict=False)
    assert model.unplaced == {PROMPT} and not model.untrained
    # A part of another file takes nothing back; the whole model does.
    part = dict(list(state.items())[:3])
    wrap(model).load_state_dict(part, strict=False)
    assert model.unplaced == {PROMPT}
    assert copy.deepcopy(model).unplaced == {PROMPT}
    wrap(model).load_state_dict(state)
    assert model.unplaced == frozenset()


def test_training_takes_what_was_left_over_back():
    model = build()
    model.load_state_dict(model.state_dict() | {PROMPT: torch.zeros(2)}, strict=False)
    model.train()
    model(_batch())
    assert model.unplaced == frozenset()


@pytest.mark.parametrize(
    ("left_out", "added", "said"),
    [
        (
            ("class_predictor.bias",),
            (),
            r"tensors that are as they were initialised \(1, the first is sem",
        ),
        ((), (PROMPT,), rf"no place for tensors that were loaded \(1, the first is {PROMPT}\)"),
        ((), (), None),
    ],
)
def test_a_model_that_is_not_the_trained_one_warns_once(left_out, added, said, caplog):
    model = build().eval()
    state = {n: v for n, v in model.state_dict().items() if not n.endswith(tuple(left_out) or "-")}
    state |= {name: torch.zeros(2) for name in added}
    model.load_state_dict(state, strict=False)
    with caplog.at_level(logging.WARNING, logger="fishertune_d2.modeling.segmentor"):
        for _ in range(2):
            model([{"image": photo(64, 64)}, {"image": photo(64, 64)}])
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == (said is not None)
    if said:
        assert re.search(said, found[0]) and "build_trained" in found[0]
