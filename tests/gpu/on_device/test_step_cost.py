"""The operators and waits of a training step on a GPU, counted on the fake device."""

import pytest

pytest.importorskip("fake_cuda.counts", reason="counts on the fake device: python tools/fake_cuda")
from fake_cuda.count_steps import StepCounts, count_steps  # noqa: E402

CONFIG = "configs/fishertune_dinov2.yaml"  # 24 blocks
# With this large share, 143 of 144 tensors have selected weights, as in wider models.
MOST_TENSORS = ["TUNING.D_MAX", "0.8"]


@pytest.fixture(scope="module")
def full() -> StepCounts:
    return count_steps(CONFIG, "full")


@pytest.fixture(scope="module")
def fishertune() -> StepCounts:
    return count_steps(CONFIG, "fishertune", MOST_TENSORS)


@pytest.mark.parametrize("method", ["full", "fishertune"])
def test_the_host_waits_four_times_a_step_at_most(method, request):
    # It downloads the matching's costs, uploads its pairs, checks the losses, and logs.
    counts = request.getfixturevalue(method)
    for iteration in [*counts.iterations[: counts.warmup], *counts.tuning]:
        assert iteration.waits.total() <= 4, _list(iteration.waits)


def test_selected_weights_cost_three_percent_of_the_operators_at_most(full, fishertune):
    for plain, selective in zip(full.tuning, fishertune.tuning, strict=True):
        extra = selective.by_name("operators") - plain.by_name("operators")
        assert selective.operators.total() <= 1.03 * plain.operators.total(), extra


def test_evaluation_writes_no_weights_and_is_full_fine_tunings(full, fishertune):
    assert fishertune.evaluation.by_name("operators") == full.evaluation.by_name("operators")


def _list(counter) -> str:
    return "\n".join(f"{number} {what} at {where}" for (what, where), number in counter.items())
