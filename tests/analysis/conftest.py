"""What drawings are looked at with."""

import pytest
from matplotlib.figure import Figure


@pytest.fixture
def drawn(monkeypatch) -> list[Figure]:
    """The figures that a test has saved, in this order."""
    figures, save = [], Figure.savefig

    def remember(figure: Figure, *args, **kwargs):
        figures.append(figure)
        return save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures
