"""Ways of building models are tested on every family of foundation models."""

import pytest


@pytest.fixture
def family(small_family) -> str:
    """The name of a VFM whose model has 6 blocks of 64 channels for the time of a test."""
    return small_family
