"""What a tuning method adds, wherever the segmentor is."""

import torch
from detectron2.modeling import build_model
from torch import nn

from fishertune_d2.engine.stages import attach
from fishertune_d2.plan.fake_model import on_fake_device
from fishertune_d2.tuning import TuningMethod


class _Adds(TuningMethod):
    """Adds layers to backbone and head, and remembers the default device.

    Args:
        device: of what it adds; None adds nothing.
    """

    adds = True

    def __init__(self, device: str | None):
        self.device = device

    def attach(self, backbone, head=None):
        self.default = torch.get_default_device()
        if self.device is not None:
            backbone.added = nn.Linear(2, 2, device=self.device)
            head.added = nn.BatchNorm1d(2, device=self.device)


def test_numbers_for_a_gpu_are_drawn_on_the_cpu(tiny_cfg):
    model, method = build_model(tiny_cfg(MODEL__DEVICE="cpu")), _Adds(None)
    with on_fake_device(model, torch.device("cuda:0")):
        attach(model, method)
    # peft draws from a CPU generator, which cannot fill a GPU's tensor.
    assert method.default == torch.device("cpu")


def test_on_the_meta_device_nothing_takes_memory(tiny_cfg):
    model, method = build_model(tiny_cfg()).to("meta"), _Adds(None)
    attach(model, method)
    assert method.default == torch.device("meta")


def test_what_is_made_elsewhere_is_moved_and_all_else_stays_the_same_objects(tiny_cfg):
    model, method = build_model(tiny_cfg()).to("meta"), _Adds("cpu")
    before = dict(model.named_parameters())
    attach(model, method)
    after = dict(model.named_parameters())
    assert len(after) == len(before) + 4
    assert all(after[name] is parameter for name, parameter in before.items())
    assert {t.device.type for t in [*after.values(), *model.buffers()]} == {"meta"}
