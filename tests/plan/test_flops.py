"""FLOPs against PyTorch's own counter, which watches real forward and backward passes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from detectron2.config import CfgNode
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fishertune_d2.modeling.vfm import VFMS
from fishertune_d2.plan.flops import (
    FORWARD,
    INPUTS,
    Flops,
    InferencePass,
    TrainingPass,
    count_flops,
)
from fishertune_d2.plan.imagined import imagine, stand_in_for_values
from fishertune_d2.plan.stages import require_dense
from fishertune_d2.tuning import build_tuning_method

# Those that PyTorch's counter knows, too.
PRODUCTS = {
    *("linear", "_convolution", "addmm", "mm", "matmul", "bmm", "baddbmm", "einsum"),
    "scaled_dot_product_attention",
}
SMALL_SAM = {"embed_dim": 64, "depth": 6, "num_heads": 2, "global_attn_indexes": (2, 5)}


def _inputs(device: str) -> list[torch.Tensor]:
    images = torch.zeros(2, 3, 48, 64, device=device)
    return [images, torch.zeros(2, 48, 64, dtype=torch.int64, device=device)]


@pytest.fixture
def models(real_model) -> Callable[[CfgNode, str], tuple[nn.Module, nn.Module]]:
    """Returns a function that builds a model without numbers and a real one, as in a stage."""

    def make(cfg: CfgNode, stage: str) -> tuple[nn.Module, nn.Module]:
        imagined, real = imagine(cfg), real_model(cfg, stage)
        require_dense(stage, imagined, build_tuning_method(cfg))
        stand_in_for_values(real)
        return imagined, real

    return make


def _products(flops: Flops) -> tuple[int, int]:
    counted = [(part, n) for (name, part), n in flops.all.items() if name in PRODUCTS]
    forward = sum(n for part, n in counted if part == FORWARD)
    return forward, sum(n for _, n in counted) - forward


def _watched(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    counts = Counter(counter.get_flop_counts()["Global"])
    # The first of five products in this kernel computes q k^T again.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counts[attention] -= counts[attention] // 5
    return sum(counts.values()) // 2  # it counts a multiplication and an addition as two


def _watched_step(model: nn.Module) -> tuple[int, int]:
    losses: list[torch.Tensor] = []
    forward = _watched(lambda: losses.append(TrainingPass(model)(*_inputs("cpu"))))
    return forward, _watched(losses[0].backward)


@pytest.mark.parametrize(
    ("method", "stage"), [("fishertune", "warmup"), ("fishertune", "tuning"), ("full", "tuning")]
)
def test_every_product_of_a_training_step_is_counted(small_cfg, models, method, stage):
    imagined, real = models(small_cfg(TUNING__METHOD=method), stage)
    flops = count_flops(TrainingPass(imagined), _inputs("meta"))
    assert not flops.uncounted
    assert _products(flops) == _watched_step(real)
    assert flops.forward > _products(flops)[0]  # norms and resampling


def test_windows_and_relative_positions_too(small_cfg, models, monkeypatch):
    options = {**VFMS["sam_vith"].options, **SMALL_SAM, "window_size": 3}
    row = replace(VFMS["sam_vith"], options=options, taps=(1, 2, 4, 5))
    monkeypatch.setitem(VFMS, "sam_vith", row)
    cfg = small_cfg(MODEL__VFM__NAME="sam_vith", TUNING__METHOD="full")
    imagined, real = models(cfg, "tuning")
    flops = count_flops(TrainingPass(imagined), _inputs("meta"))
    assert not flops.uncounted
    assert _products(flops) == _watched_step(real)


def test_measuring_leaves_out_gradients_of_the_decoders_weights(small_cfg, models):
    imagined, real = models(small_cfg(), "tuning")
    flops = count_flops(TrainingPass(imagined), _inputs("meta"))
    loss = TrainingPass(real)(*_inputs("cpu"))
    decoder = set(real.sem_seg_head.parameters())
    others = [p for p in real.parameters() if p.requires_grad and p not in decoder]
    measured = _watched(lambda: torch.autograd.grad(loss, others))
    rest = sum(
        n for (name, part), n in flops.all.items() if part == INPUTS and name not in PRODUCTS
    )
    # Counted, though not computed: gradients of what only weights of the decoder lead to.
    counted = flops.measuring - flops.forward - rest
    assert counted == pytest.approx(measured, rel=0.01) and counted >= measured


def test_a_pass_without_gradients_has_no_backward_pass(small_cfg, models):
    imagined, real = models(small_cfg(), "tuning")
    with torch.no_grad():
        flops = count_flops(InferencePass(imagined.eval()), _inputs("meta")[:1])
        watched = _watched(lambda: InferencePass(real.eval())(_inputs("cpu")[0]))
    assert flops.backward == 0 and not flops.uncounted
    # The trace leaves out the classes of all predictions but the last, which nobody uses.
    unused = 2 * (2 * 8 * 32 * 4)  # predictions; images, queries, channels, classes
    assert _products(flops) == (watched - unused, 0)


def test_an_operator_that_nobody_counts_is_named():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(3, 3)

        def forward(self, x):
            x = torch.linalg.matrix_exp(self.backbone(x)).add(1)
            return nn.functional.adaptive_avg_pool2d(x[None], 1)

    flops = count_flops(Odd().to("meta"), [torch.zeros(3, 3, device="meta")])
    assert flops.uncounted == {"aten::linalg_matrix_exp": 1}
    assert flops.forward == 27 + 9  # the pooling is fvcore's own
