"""Tests of behaviour that only a GPU shows.

On a CPU, test_on_fake_cuda.py runs the core of these tests and of other folders' on the fake device
of tools/fake_cuda. With FISHERTUNE_TEST_DEVICE=cuda, pytest collects the tests of on_device/ as
usual. They run on a GPU, or all of them on the fake device with

    FISHERTUNE_TEST_DEVICE=cuda python tools/fake_cuda -m pytest tests/gpu
"""

from ..conftest import DEVICE

collect_ignore = ["on_device"] if DEVICE == "cpu" else ["test_on_fake_cuda.py"]
