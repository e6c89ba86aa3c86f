import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fishertune_d2.fisher import schedule as schedules
from fishertune_d2.fisher import tuned_share

SCHEDULES = ("growing", "eq16", "linear", "constant")


def test_listed_values():
    at = (0.0, 0.5, 1.0)
    half = (1 - math.exp(-0.5)) / (1 - math.exp(-1))
    growing = [tuned_share(t, 0.01, 0.05) for t in at]
    assert growing == pytest.approx([0.01, 0.01 + 0.04 * half, 0.05])
    assert [tuned_share(t, 0.01, 0.05, schedule="linear") for t in at] == pytest.approx(
        [0.01, 0.03, 0.05]
    )
    assert [tuned_share(t, 0.01, 0.05, schedule="constant") for t in at] == [0.05] * 3
    thresholds = [0.95 + 0.04 * math.exp(-t) for t in at]  # Eq. 16
    assert [tuned_share(t, 0.95, 0.99, schedule="eq16") for t in at] == pytest.approx(
        [1 - threshold for threshold in thresholds]
    )


@pytest.mark.parametrize("schedule", ["growing", "linear"])
def test_ends_are_exact(schedule):
    assert tuned_share(0.0, 0.01, 0.05, schedule=schedule) == 0.01
    assert tuned_share(1.0, 0.01, 0.05, schedule=schedule) == 0.05


@given(
    st.sampled_from(SCHEDULES),
    st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
    st.lists(st.floats(0, 1), min_size=2, max_size=2).map(sorted),
)
def test_never_falls_and_is_a_share(schedule, bounds, times):
    shares = [tuned_share(t, *bounds, schedule=schedule) for t in times]
    assert 0.0 <= shares[0] <= shares[1] <= 1.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1.5, 0.0, 0.1, "growing"), "progress must be in .* got 1.5"),
        ((0.5, 0.2, 0.1, "growing"), "got d_min 0.2, d_max 0.1"),
        ((0.5, 0.1, 0.2, "cosine"), "unknown schedule 'cosine': choose from"),
    ],
)
def test_refuses(arguments, message):
    progress, d_min, d_max, schedule = arguments
    with pytest.raises(ValueError, match=message):
        tuned_share(progress, d_min, d_max, schedule=schedule)


def test_former_names_work_and_warn_once():
    schedules._warn_once.cache_clear()
    with pytest.warns(FutureWarning) as warned:
        shares = [tuned_share(0.3, 0.01, 0.05, schedule="text") for _ in range(3)]
        shares += [tuned_share(0.3, 0.01, 0.05, form="growing") for _ in range(3)]
    assert set(shares) == {tuned_share(0.3, 0.01, 0.05)}
    assert [str(warning.message) for warning in warned] == [
        "the schedule 'text' (TUNING.SCHEDULE) is now called 'growing'",
        "the argument form of tuned_share is now called schedule",
    ]
