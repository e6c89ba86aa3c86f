"""The rates at which a machine computes the stages of a run.

A rate is in TFLOP a second, and one multiply-add is one FLOP, as everywhere in the plan. It covers
the whole step: the kernels, and the time in which the device waits for the host.
"""

import argparse
from collections.abc import Mapping

# Peaks of the tensor cores in TF32 without sparsity, in TFLOP a second, from NVIDIA's data sheets
# and white papers. They count a multiply-add as two FLOPs. h100 and h200 are the SXM modules.
CARDS = {
    "a40": 74.8,
    "a100": 156.0,
    "a6000": 77.4,
    "h100": 494.7,
    "h200": 494.7,
    "l40s": 183.0,
    "rtx3090": 35.6,
    "rtx4090": 82.6,
}

# The share of that peak at which whole steps ran on an H200 (docs/results/gpu.json): ViT-L, batches
# of 4 images of 512 x 512, TF32; evaluation with 6 windows at once. The kernels of a warm-up step
# took 86 of its 216 ms, those of a tuning step 156 of 332 ms; the rest was waiting for the host.
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
    return {stage: share * CARDS[options.card] / 2 for stage, share in EFFICIENCY.items()}
