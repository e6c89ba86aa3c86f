"""Models that checkpoint activations are measured as those that do not."""

import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)

from fishertune_d2.fisher import (
    ESTIMATORS,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
    keeping_activations,
)


def _estimate(model, images, loss, **options):
    shift = StatisticsPerturbation([model.patch_embed, model.blocks[0]], num_prefix_tokens=[0, 1])
    candidates = find_candidates(model)
    return estimate_fisher(model, [images(3)], loss, candidates, perturb=shift, **options)


@pytest.mark.parametrize("estimator", sorted(ESTIMATORS))
def test_timms_checkpoints_change_no_number_and_are_on_again_afterwards(
    estimator, vit, images, loss
):
    plain, model = vit(), vit()
    model.set_grad_checkpointing(True)
    measured = [_estimate(m, images, loss, estimator=estimator) for m in (plain, model)]
    for part in ("f", "shifted"):
        one, other = (getattr(estimate, part) for estimate in measured)
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert (plain.grad_checkpointing, model.grad_checkpointing) == (False, True)


def test_they_are_on_again_after_an_error_too(vit):
    model = vit()
    model.set_grad_checkpointing(True)
    with pytest.raises(RuntimeError, match="of something else"), keeping_activations(model):
        assert not model.grad_checkpointing
        raise RuntimeError("of something else")
    assert model.grad_checkpointing


def test_transformers_flag_is_switched_off(vit):
    model = nn.Sequential(vit())
    model[0].gradient_checkpointing = True
    with keeping_activations(model):
        assert not model[0].gradient_checkpointing
    assert model[0].gradient_checkpointing


def test_fairscales_checkpoints_are_switched_off(vit, monkeypatch):
    seen = []

    @contextmanager
    def disable_checkpointing():
        seen.append("off")
        yield
        seen.append("on")

    name = "fairscale.nn.checkpoint.checkpoint_activations"
    stub = SimpleNamespace(disable_checkpointing=disable_checkpointing)
    monkeypatch.setitem(sys.modules, name, stub)
    with keeping_activations(vit()):
        seen.append("inside")
    assert seen == ["off", "inside", "on"]


SWITCH = "cannot switch off: build it without, or let it read a flag"


@pytest.mark.parametrize(
    "estimator, kind, message",
    [
        ("diagonal_loop", "NO_REENTRANT", SWITCH),
        ("diagonal_loop", "REENTRANT", SWITCH),
        ("batch_mean", "REENTRANT", SWITCH),
        ("diagonal", "NO_REENTRANT", SWITCH),
        ("diagonal", "REENTRANT", "is used where no graph is kept, by torch.no_grad or an activat"),
    ],
)
def test_checkpoints_that_cannot_be_switched_off_are_refused(
    estimator, kind, message, vit, images, loss
):
    model, kind = vit(), CheckpointImpl[kind]
    candidates = find_candidates(model)
    shift = StatisticsPerturbation([model.patch_embed, model.blocks[0]], num_prefix_tokens=[0, 1])
    for i, block in enumerate(model.blocks):
        model.blocks[i] = checkpoint_wrapper(block, checkpoint_impl=kind)
    with pytest.raises(ValueError, match=message):
        estimate_fisher(model, [images(3)], loss, candidates, estimator=estimator, perturb=shift)
