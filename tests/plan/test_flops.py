"""FLOPs against closed forms, and against PyTorch's counter on real training steps."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from torchvision.ops import deform_conv2d

from fishertune_d2.fisher import find_candidates
from fishertune_d2.modeling.vfm import VFMS
from fishertune_d2.plan.fake_model import fake_selection, match_in_order
from fishertune_d2.plan.fake_run import FakeRun
from fishertune_d2.plan.flops import count_flops
from fishertune_d2.plan.stage_costs import held_memory, step_flops
from fishertune_d2.tuning import SelectedWeights, build_tuning_method

N, A, B, C = 5, 7, 11, 13  # samples, and the features before, between and after two layers
SMALL_SAM = {"embed_dim": 64, "depth": 6, "num_heads": 2, "global_attn_indexes": (2, 5)}


def _two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(A, B), nn.GELU(), nn.Linear(B, C)).to("meta")


def _counts(forward: Callable[[], Tensor], wanted) -> tuple[int, int]:
    flops = count_flops(forward, list(wanted))
    assert not flops.uncounted
    return flops.forward, flops.backward


def test_a_backward_pass_costs_a_product_for_each_weight_and_each_input_with_a_gradient():
    model, x = _two_layers(), torch.empty(N, A, device="meta")
    first, second = N * A * B, N * B * C
    # No gradient of x: it is data.
    assert _counts(lambda: model(x), model.parameters()) == (first + second, first + 2 * second)
    assert _counts(lambda: model(x.requires_grad_()), [*model.parameters(), x])[1] == 2 * (
        first + second
    )
    assert _counts(lambda: model(x), []) == (first + second, 0)


@pytest.mark.parametrize(
    ("frozen", "backward"),
    [(0, 2 * N * B * C - N * B * C), (2, N * B * C + N * A * B)],
)
def test_a_frozen_layer_has_no_gradient_and_none_passes_to_frozen_layers_before(frozen, backward):
    model, x = _two_layers(), torch.empty(N, A, device="meta")
    model[frozen].requires_grad_(False)
    wanted = [p for p in model.parameters() if p.requires_grad]
    assert _counts(lambda: model(x), wanted)[1] == backward


def test_attention_is_two_products_and_its_backward_pass_four():
    q, k, v = (torch.empty(2, 3, n, 8, device="meta").requires_grad_() for n in (N, A, A))
    product = 2 * 3 * N * A * 8
    forward = lambda: F.scaled_dot_product_attention(q, k, v)  # noqa: E731
    assert _counts(forward, [q, k, v]) == (2 * product, 4 * product)
    # Gradients of v alone: one product.
    q.requires_grad_(False), k.requires_grad_(False)
    assert _counts(forward, [v]) == (2 * product, product)


def test_convolutions_and_checkpointed_blocks():
    conv = nn.Conv2d(3, 4, kernel_size=2, stride=2).to("meta")
    images = torch.empty(2, 3, 6, 8, device="meta")
    product = 2 * (3 * 4) * (4 * 3 * 2 * 2)  # images, places, weights
    assert _counts(lambda: conv(images), conv.parameters()) == (product, product)
    model, x = _two_layers(), torch.empty(N, A, device="meta")
    plain = _counts(lambda: model(x), model.parameters())
    again = _counts(lambda: checkpoint(model, x, use_reentrant=False), model.parameters())
    assert again[0] == plain[0]
    # PyTorch stops recomputing at the last tensor that the backward pass needs.
    assert again[1] == plain[1] + N * A * B


def test_a_selection_in_the_last_layer_alone_needs_no_gradient_before_it():
    model, x = _two_layers(), torch.empty(N, A, device="meta")
    parameters = {"2.weight": model[2].weight}
    selected = SelectedWeights(model, fake_selection(parameters, count=9, base=A * B + B * C))
    model.requires_grad_(False)
    vectors = list(selected.parameters().values())
    for vector in vectors:
        vector.requires_grad_(True)
    assert sum(v.numel() for v in vectors) == 9
    # The 9 gradients are picked from the gradient of the whole matrix.
    assert _counts(lambda: model(x), vectors) == (N * A * B + N * B * C, N * B * C)


def _watched(work: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        work()
    counts = Counter(counter.get_flop_counts()["Global"])
    # The first of five products in this kernel computes q k^T again.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    counts[attention] -= counts[attention] // 5
    return sum(counts.values()) // 2  # it counts a multiplication and an addition as two


def _planned(cfg, stage: str) -> int:
    flops, uncounted = step_flops(FakeRun(cfg, build_tuning_method(cfg), (48, 64)), stage)
    assert not uncounted
    return flops


def _step(model: nn.Module, batch: list[dict]) -> None:
    model.sem_seg_head.criterion.match = match_in_order  # the plan leaves out the matcher's work
    sum(model(batch).values()).backward()


@pytest.mark.parametrize(
    ("method", "stage"), [("fishertune", "warmup"), ("fishertune", "tuning"), ("full", "tuning")]
)
def test_a_planned_step_is_a_real_step(small_cfg, real_model, real_batch, method, stage):
    cfg = small_cfg(TUNING__METHOD=method)
    assert _planned(cfg, stage) == _watched(lambda: _step(real_model(cfg, stage), real_batch(2)))


def test_a_step_of_neurons_computes_their_part_of_the_gradients(small_cfg, real_model, real_batch):
    planned = {}
    for unit in ("weight", "neuron"):
        cfg = small_cfg(TUNING__UNIT=unit, TUNING__D_MAX=0.2)
        planned[unit] = _planned(cfg, "tuning")
        watched = _watched(lambda cfg=cfg: _step(real_model(cfg, "tuning"), real_batch(2)))
        # The plan spreads neurons evenly; the real ones were drawn.
        assert planned[unit] == pytest.approx(watched, rel=0 if unit == "weight" else 0.01)
    assert planned["neuron"] < planned["weight"]


def test_windows_and_relative_positions_too(small_cfg, real_model, real_batch, monkeypatch):
    options = {**VFMS["sam_vith"].options, **SMALL_SAM, "window_size": 3}
    small = replace(VFMS["sam_vith"], options=options, taps=(1, 2, 4, 5))
    monkeypatch.setitem(VFMS, "sam_vith", small)
    cfg = small_cfg(MODEL__VFM__NAME="sam_vith", TUNING__METHOD="full")
    model = real_model(cfg, "tuning")
    assert _planned(cfg, "tuning") == _watched(lambda: _step(model, real_batch(2)))


def test_blocks_that_compute_again_are_paid_twice(small_cfg, real_model, real_batch):
    cfg = small_cfg(TUNING__METHOD="full", MODEL__VFM__CHECKPOINT_BLOCKS=True)
    model = real_model(cfg, "tuning")
    planned = _planned(cfg, "tuning")
    assert planned == _watched(lambda: _step(model, real_batch(2)))
    assert planned > 1.1 * _planned(small_cfg(TUNING__METHOD="full"), "tuning")


def test_the_estimate_needs_no_gradients_of_the_decoders_weights(small_cfg, real_model, real_batch):
    cfg = small_cfg()
    model = real_model(cfg, "warmup")
    wanted = [candidate.parameter for candidate in find_candidates(model.backbone)]
    for parameter in wanted:
        parameter.requires_grad_(True)
    model.sem_seg_head.criterion.match = match_in_order
    measured = _watched(lambda: torch.autograd.grad(sum(model(real_batch(2)).values()), wanted))
    assert _planned(cfg, "estimation") == 2 * measured  # on x and on x'


def test_one_image_at_a_time_needs_one_more_forward_pass_for_eq6(small_cfg):
    runs = []
    for estimator, kind in (
        ("diagonal", "features"),
        ("diagonal_loop", "features"),
        ("diagonal_loop", "night"),
    ):
        cfg = small_cfg(FISHER__ESTIMATOR=estimator, FISHER__PERTURB__KIND=kind)
        runs.append(FakeRun(cfg, build_tuning_method(cfg), (48, 64)))
    batch, loop, by_images = (step_flops(run, "estimation")[0] for run in runs)
    model = runs[0].model("estimation")
    runs[0].enter_end("estimation", model)
    step = runs[0].one_pass("estimation", model, torch.device("meta"))
    forward = count_flops(step.loss, step.wanted).forward
    assert loop - batch == pytest.approx(forward, rel=0.01)
    assert by_images == batch  # a shift of the images draws nothing in the model


def test_expensive_operators_without_a_formula_are_named():
    layer, x = nn.Linear(3, 3).to("meta"), torch.empty(3, 3, device="meta")
    flops = count_flops(lambda: torch.linalg.matrix_exp(layer(x)).add(1))
    assert flops.uncounted == {"aten.linalg_matrix_exp": 1}
    assert flops.forward == 27


def test_operators_from_outside_pytorch_are_named():
    images, weight = torch.empty(1, 3, 8, 8, device="meta"), torch.empty(4, 3, 3, 3, device="meta")
    offset = torch.empty(1, 18, 6, 6, device="meta")
    flops = count_flops(lambda: deform_conv2d(images, offset, weight))
    assert flops.uncounted == {"torchvision.deform_conv2d": 1}


def test_a_teacher_costs_a_forward_pass_over_each_unlabelled_image(small_cfg):
    """Two of three images are labelled by the teacher, on the backbone and the head."""
    keys = {"TUNING__METHOD": "freeze", "SOLVER__IMS_PER_BATCH": 6}
    plain, taught = (
        FakeRun(cfg, build_tuning_method(cfg), (64, 64))
        for images in ("", "folder")
        for cfg in [small_cfg(**keys, SELF_TRAINING__IMAGES=images)]
    )
    model = plain.model("tuning")
    with torch.no_grad():
        one = count_flops(lambda: model.eval().scores(torch.empty(3, 64, 64, device="meta")))
    steps = [step_flops(run, "tuning")[0] for run in (plain, taught)]
    assert steps[1] - steps[0] == 4 * one.forward > 0
    memory = [held_memory(run, "tuning").averages for run in (plain, taught)]
    head = sum(p.numel() for p in model.sem_seg_head.parameters())
    assert memory == [0, 4 * head]
    assert step_flops(taught, "warmup") == step_flops(plain, "warmup")
