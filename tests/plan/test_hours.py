"""Seconds of a run: FLOPs divided by rates, and where the rates come from."""

import argparse
import json
from collections import Counter
from pathlib import Path

import pytest

from fishertune_d2.plan import Plan, Stage, format_hours
from fishertune_d2.plan.flops import Flops
from fishertune_d2.plan.hours import seconds, unknown_sets
from fishertune_d2.plan.inference import Inference
from fishertune_d2.plan.memory import Memory
from fishertune_d2.plan.rates import CARDS, EFFICIENCY, add_rate_options, card_notes, read_rates

MEASURED = Path(__file__).parents[2] / "docs/results/gpu.json"


@pytest.fixture
def plan() -> Plan:
    """Of two stages, and of test sets with 500, 500 and an unknown number of images."""
    stages = [
        Stage("warmup", 100, 2, 3 * 10**12, Counter(), Memory()),
        Stage("tuning", 200, 2, 7 * 10**12, Counter(), Memory()),
    ]
    window = Flops(2 * 10**11, 0, Counter())
    inference = [
        Inference(("cityscapes_val",), (512, 1024), (512, 512), 3, window),
        Inference(("nobody_has_it",), None, (512, 512), 1, window),
    ]
    return Plan("full", "tiny", "cpu", (8, 8), {}, stages, inference, 4, {}, 0)


def test_seconds_are_flops_by_rates(plan):
    rates = {"warmup": 1.0, "tuning": 2.0, "evaluation": 0.5}
    expected = {"warmup": 300.0, "tuning": 700.0, "evaluation": 4 * 500 * 3 * 0.2 / 0.5}
    assert seconds(plan, rates) == pytest.approx(expected)
    assert unknown_sets(plan) == ["nobody_has_it"]
    printed = format_hours(plan, rates)
    for hours in expected.values():
        assert f" {hours / 3600:.2f}\n" in printed
    assert f" {sum(expected.values()) / 3600:.2f}\n" in printed
    assert "Evaluations of all test sets: 4." in printed
    assert "NOT counted, for their number of images is not known: nobody_has_it." in printed


def _rates(*words: str):
    parser = argparse.ArgumentParser()
    add_rate_options(parser)
    return read_rates(parser.parse_args(words))


def test_a_rate_is_measured_or_a_share_of_a_cards_peak(capsys):
    assert _rates() is None
    assert set(_rates("--tflops", "0.25").values()) == {0.25}
    a100, h100 = _rates("--card", "a100"), _rates("--card", "h100")
    assert a100["tuning"] == pytest.approx(0.5 * EFFICIENCY["tuning"] * 156)  # multiply-adds
    for stage in EFFICIENCY:
        assert h100[stage] / a100[stage] == pytest.approx(494.7 / 156)
    for rate in ("0", "-1", "nan"):
        with pytest.raises(ValueError, match=f"--tflops {rate}: give a rate above 0"):
            _rates("--tflops", rate)
    with pytest.raises(SystemExit):
        _rates("--tflops", "1", "--card", "a100")
    assert "not allowed with" in capsys.readouterr().err


def test_the_notes_say_both_peaks_and_the_share_of_the_one_that_the_hours_use():
    assert card_notes(None) == []
    words = " ".join(card_notes("rtx3090"))
    assert "35.6 TFLOP a second in TF32, 71 in bfloat16" in words
    assert f"{100 * EFFICIENCY['warmup']:g} to {100 * EFFICIENCY['evaluation']:g} %" in words


@pytest.mark.parametrize("card", CARDS)
def test_tensor_cores_are_twice_as_fast_in_bfloat16(card):
    assert CARDS[card].bfloat16 / CARDS[card].tf32 == pytest.approx(2, rel=0.015)


def test_the_efficiency_is_the_measured_one():
    found = json.loads(MEASURED.read_text())
    steps = {row["way"]: row for row in found["training"] if row["precision"] == "TF32"}
    evaluated = next(
        row for row in found["evaluation"] if (row["precision"], row["windows"]) == ("TF32", 6)
    )
    fisher = next(
        row
        for row in found["fisher"]
        if (row["precision"], row["estimator"]) == ("TF32", "diagonal")
    )
    # TFLOP as python -m fishertune_d2.plan --config-file configs/fishertune_dinov2.yaml prints it,
    # and its seconds: F(x) is half an estimation, and the image has 18 windows.
    measured = {
        "warmup": (2.01, steps["warm-up"]["step_ms"] / 1e3),
        "estimation": (9.26 / 2, fisher["seconds"]),
        "tuning": (4.80, steps["fishertune"]["step_ms"] / 1e3),
        "evaluation": (18 * 0.41, evaluated["image_ms"] / 1e3),
    }
    card = found["about"]["device"].split()[-1].lower()
    for stage, (tflop, duration) in measured.items():
        share = 2 * tflop / duration / CARDS[card].tf32
        assert EFFICIENCY[stage] == pytest.approx(share, rel=0.05), stage
