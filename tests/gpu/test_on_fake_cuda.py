"""Tests the core of the project on the fake CUDA device of tools/fake_cuda.

The other tests of the fake device, such as every way of tuning, take minutes. Run them by name:

    FISHERTUNE_TEST_DEVICE=cuda python tools/fake_cuda -m pytest tests/engine -k tuner_of_peft
    FISHERTUNE_TEST_DEVICE=cuda python tools/fake_cuda -m pytest tests/engine tests/predict
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Each part is one process, because importing everything takes as long as several tests.
CORE = {
    "the method and the trainer": [
        "tests/gpu/on_device/test_estimates.py",
        "tests/tuning/test_selected_weights.py::test_trains_as_a_dense_mask_does[vit-weight]",
        "tests/tuning/test_selected_weights.py::test_trains_as_a_dense_mask_does[vit-neuron]",
        "tests/engine/test_trainer.py::test_three_stages_write_what_they_promise",
        "tests/engine/test_trainer.py::test_resume_gives_the_same_weights[5]",
        "tests/engine/test_step_trainer.py::test_autocast_trains_float32_weights_and_resumes[float16]",
    ],
    # Its config trains in bfloat16.
    "what a step costs": ["tests/gpu/on_device/test_step_cost.py"],
}


@pytest.mark.skipif(shutil.which("gcc") is None, reason="needs gcc, for the fake CUDA device")
@pytest.mark.parametrize("part", CORE)
def test_on_the_fake_device(part):
    words = ["-q", "--no-header", "-p", "no:cacheprovider", *CORE[part]]
    environment = os.environ | {"FISHERTUNE_TEST_DEVICE": "cuda", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "tools/fake_cuda", "-m", "pytest", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert run.returncode == 0, f"on the fake CUDA device:\n{run.stdout}"
    assert " passed" in run.stdout and " skipped" not in run.stdout, run.stdout
