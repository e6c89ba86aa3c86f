"""Estimators are tested on one thread."""

import pytest


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this folder."""
