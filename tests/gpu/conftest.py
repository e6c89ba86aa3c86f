"""What only a GPU shows.

On a CPU, test_on_fake_cuda.py runs the core of these and of other folders' tests on the fake device
of tools/fake_cuda. With FISHERTUNE_TEST_DEVICE=cuda the tests of on_device/ are collected like any
others: on a GPU that is there, or all of them on the fake device by

    FISHERTUNE_TEST_DEVICE=cuda python tools/fake_cuda -m pytest tests/gpu
"""

from ..conftest import DEVICE

collect_ignore = ["on_device"] if DEVICE == "cpu" else ["test_on_fake_cuda.py"]
