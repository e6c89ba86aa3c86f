import numpy as np
import pytest
from scipy import stats

from fishertune_d2.analysis.statistics import (
    Difference,
    format_difference,
    mean_and_std,
    paired_difference,
)


def test_mean_and_sample_deviation():
    assert mean_and_std([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))  # (4 + 1 + 9) / 2
    assert mean_and_std([5.0]) == (5.0, None)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_interval_is_that_of_scipys_paired_test(n):
    rng = np.random.default_rng(n)
    ours, theirs = rng.normal(50, 2, n), rng.normal(48, 2, n)
    found = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    interval = stats.ttest_rel(ours, theirs).confidence_interval(0.95)
    assert (found.pairs, found.mean) == (n, pytest.approx((ours - theirs).mean()))
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))


def test_interval_in_closed_form_for_two_pairs():
    # Differences 1 and 3: with one degree of freedom t is Cauchy's, whose quantile is tan.
    found = paired_difference({1: 11.0, 2: 23.0, 3: 9.0}, {2: 20.0, 1: 10.0, 4: 0.0})
    half = np.tan(np.pi * 0.475) * 2**0.5 / 2**0.5
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))


def test_one_pair_has_no_interval_and_none_no_difference():
    assert paired_difference({1: 3.0, 2: 9.0}, {1: 1.0}) == Difference(1, 2.0)
    assert paired_difference({1: 3.0}, {2: 1.0}) is None


def test_a_difference_in_words():
    texts = [
        format_difference(d) for d in (None, Difference(1, 2.0), Difference(2, 1.0, -0.5, 2.5))
    ]
    assert texts == ["-", "+2.00 (one seed)", "+1.00 [-0.50, +2.50]"]
