"""The rates at which a machine computes the stages of a run.

A rate is in TFLOP a second, and one multiply-add is one FLOP, as everywhere in the plan. It covers
the whole step: the kernels, and the time in which the device waits for the host.
"""

import argparse
from collections.abc import Mapping
from typing import NamedTuple


class Peaks(NamedTuple):
    """Peaks of a card's tensor cores without sparsity, in TFLOP a second.

    They count a multiply-add as two FLOPs. Sums are float32.
    """

    tf32: float
    bfloat16: float


# From NVIDIA's data sheets of A40, A100 and L40S, and its white papers on GA102 (RTX A6000 and RTX
# 3090), Ada (RTX 4090) and H100. h100 and h200 are the SXM modules, which have the same chip.
CARDS = {
    "a40": Peaks(74.8, 149.7),
    "a100": Peaks(156.0, 312.0),
    "a6000": Peaks(77.4, 154.8),
    "h100": Peaks(494.7, 989.4),
    "h200": Peaks(494.7, 989.4),
    "l40s": Peaks(183.0, 362.05),
    "rtx3090": Peaks(35.6, 71.0),
    "rtx4090": Peaks(82.6, 165.2),
}

# The share of the TF32 peak at which whole steps ran on an H200 (docs/results/gpu.json): ViT-L,
# batches of 4 images of 512 x 512, TF32; evaluation with 6 windows at once. The kernels of a
# warm-up step took 86 of its 216 ms, those of a tuning step 156 of 332 ms; the rest was waiting for
# the host.
EFFICIENCY = {"warmup": 0.038, "estimation": 0.042, "tuning": 0.058, "evaluation": 0.12}


def add_rate_options(parser: argparse.ArgumentParser) -> None:
    """Adds ``--card NAME`` and ``--tflops RATE``, which :func:`read_rates` reads."""
    rate = parser.add_mutually_exclusive_group()
    rate.add_argument("--card", choices=list(CARDS), help="say the hours on one such card")
    rate.add_argument(
        "--tflops",
        type=float,
        metavar="RATE",
        help="say the hours at a measured rate: the TFLOP of a step, divided by its seconds",
    )


def read_rates(options: argparse.Namespace) -> Mapping[str, float] | None:
    """The rate of each stage that the options of a command ask for; None without such an option.

    Args:
        options: those of :func:`add_rate_options`.

    Returns:
        TFLOP a second, for "warmup", "estimation", "tuning" and "evaluation".

    Raises:
        ValueError: if the rate is not above 0.
    """
    if options.tflops is not None:
        if not options.tflops > 0:
            raise ValueError(f"--tflops {options.tflops:g}: give a rate above 0")
        return dict.fromkeys(EFFICIENCY, options.tflops)
    if options.card is None:
        return None
    # Half the peak, because a multiply-add is one FLOP here. The same for bfloat16: on the H200 it
    # made F 1.07 times as fast and evaluation 1.4 times, and training was not measured in it.
    return {stage: share * CARDS[options.card].tf32 / 2 for stage, share in EFFICIENCY.items()}


def card_notes(card: str | None) -> list[str]:
    """The lines about where the rates of a card come from; none without a card."""
    if card is None:
        return []
    peaks, shares = CARDS[card], [100 * share for share in EFFICIENCY.values()]
    return [
        f"Peaks of {card}, without sparsity: {peaks.tf32:g} TFLOP a second in TF32, "
        f"{peaks.bfloat16:g} in bfloat16. NVIDIA counts a",
        f"multiply-add as two FLOPs. The hours assume {min(shares):g} to {max(shares):g} % of the "
        "TF32 peak, as measured on an H200 in",
        "TF32. bfloat16 counts as TF32: no training in bfloat16 has been measured.",
    ]
