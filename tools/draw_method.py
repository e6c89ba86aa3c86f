#!/usr/bin/env python
"""Draws the method as a diagram of three stages, for the README and the notebooks.

python tools/draw_method.py     # writes docs/images/method.svg
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from readme_svg import box, drawing, text  # noqa: E402

from fishertune_d2.fisher import tuned_share  # noqa: E402

PICTURE = ROOT / "docs/images/method.svg"
WIDTH, HEIGHT = 960, 432
COLUMNS = (20, 335, 650)  # left edges of the stages
STAGE = 290  # width of a stage
D_MIN, D_MAX = 0.01, 0.05  # the defaults of TUNING.D_MIN and TUNING.D_MAX
GRID_COLUMNS, GRID_ROWS = 12, 6


def draw() -> str:
    """Returns the diagram as SVG."""
    return drawing(
        WIDTH,
        HEIGHT,
        "The three stages of FisherTune",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
        *_warmup(COLUMNS[0]),
        *_estimation(COLUMNS[1]),
        *_tuning(COLUMNS[2]),
        *_arrows_between_stages(),
        *_legend(),
    )


def _warmup(left: int) -> Iterator[str]:
    middle = left + STAGE // 2
    yield from _panel(left, "T1  Warm-up", "Only the decoder trains.")
    yield from _titled_box(left + 20, 98, 250, 36, "plain", "source images x")
    yield _arrow(f"M{middle} 134V150")
    yield from _titled_box(left + 20, 152, 250, 112, "plain", "backbone", title_at=172)
    yield from _grid(left + 64, 182, ["frozen"] * GRID_COLUMNS * GRID_ROWS)
    yield _arrow(f"M{middle} 264V280")
    yield from _titled_box(left + 20, 282, 250, 36, "trains", "decoder")
    yield text(middle, 346, "no backward pass through the backbone", "quiet middle")


def _estimation(left: int) -> Iterator[str]:
    yield from _panel(left, "T2  Estimation", "F is measured; no weight changes.")
    for x, image, fisher in ((left + 20, "images x", "F(x)"), (left + 155, "shifted x′", "F(x′)")):
        middle = x + 57
        yield from _titled_box(x, 98, 115, 36, "plain", image)
        yield _arrow(f"M{middle} 134V150")
        yield from _titled_box(x, 152, 115, 36, "measured", fisher)
        yield _arrow(f"M{middle} 188V204")
    yield _arrow(f"M{left + 135} 116H{left + 153}")
    yield text(left + 145, 92, "Eq. 6", "quiet middle")
    yield from _titled_box(left + 20, 206, 250, 36, "measured", "DRF: F(x) and its change at x′")
    yield _arrow(f"M{left + 145} 242V258")
    yield from _ranking(left + 20, 260)
    yield text(left + 145, 346, "all candidate weights, ranked by DRF", "quiet middle")


def _ranking(left: int, top: int) -> Iterator[str]:
    """Draws weights as bars of falling height, and marks those that are selected."""
    yield box("plain", left, top, 250, 58)
    bars, selected = 30, 5
    for i in range(bars):
        height = round(44 / (1 + i / 4)) + 3
        kind = "trains" if i < selected else "frozen"
        yield box(kind, left + 12 + 7.6 * i, top + 52 - height, 6, height, radius=0)
    cut = left + 12 + 7.6 * selected - 0.8
    yield f'<path class="line" stroke-dasharray="4 3" d="M{cut:g} {top + 4}V{top + 54}"/>'
    yield text(cut + 8, top + 20, "mask: the highest 5 %", "quiet")


def _tuning(left: int) -> Iterator[str]:
    middle = left + STAGE // 2
    yield from _panel(left, "T3  Tuning", "Decoder and selected weights train.")
    yield from _titled_box(left + 20, 98, 250, 36, "plain", "source images x")
    yield _arrow(f"M{middle} 134V150")
    yield from _titled_box(left + 20, 152, 250, 112, "plain", "backbone", title_at=172)
    chosen = {3, 10, 17, 25, 29, 32, 38, 44, 51, 62}
    cells = GRID_COLUMNS * GRID_ROWS
    yield from _grid(left + 28, 182, ["trains" if i in chosen else "frozen" for i in range(cells)])
    yield from _share_curve(left + 204, 176)
    yield _arrow(f"M{middle} 264V280")
    yield from _titled_box(left + 20, 282, 250, 36, "trains", "decoder")
    yield text(middle, 346, "all other weights keep their value to the bit", "quiet middle")


def _share_curve(left: int, top: int) -> Iterator[str]:
    """Draws how the share of the weights that train grows during the stage."""
    width, height = 50, 62
    shares = [tuned_share(i / 20, D_MIN, D_MAX) / D_MAX for i in range(21)]
    points = [
        f"{left + width * i / 20:.1f} {top + height * (1 - share):.1f}"
        for i, share in enumerate(shares)
    ]
    yield f'<path class="line" d="M{left} {top}V{top + height}H{left + width}"/>'
    yield f'<path class="curve" d="M{"L".join(points)}"/>'
    bounds = f"{100 * D_MIN:.0f} to {100 * D_MAX:.0f} %"
    yield text(left + 24, top + height + 18, bounds, "quiet middle")


def _arrows_between_stages() -> Iterator[str]:
    first, second, third = COLUMNS
    yield _arrow(f"M{first + 270} 300H{first + 302}V170H{second + 18}")
    yield _arrow(f"M{second + 270} 289H{second + 302}V208H{third + 18}")


def _legend() -> Iterator[str]:
    entries = (("frozen", "frozen"), ("trains", "trains"), ("measured", "measured"))
    for i, (kind, label) in enumerate(entries):
        x = 36 + 110 * i
        yield box(kind, x, 394, 16, 16, radius=3)
        yield text(x + 24, 407, label, "quiet")
    note = "F: Fisher information (Eq. 8, 9)     DRF: domain-related Fisher information (Eq. 15)"
    yield text(924, 407, note, "quiet right")


def _panel(left: int, title: str, subtitle: str) -> Iterator[str]:
    yield box("panel", left, 20, STAGE, 346, radius=10)
    yield text(left + 20, 48, title, "head")
    yield text(left + 20, 70, subtitle, "quiet")


def _titled_box(
    left: int, top: int, width: int, height: int, kind: str, title: str, title_at: int | None = None
) -> Iterator[str]:
    yield box(kind, left, top, width, height)
    yield text(left + width / 2, title_at or top + height / 2 + 5, title, "middle")


def _grid(left: int, top: int, kinds: list[str]) -> Iterator[str]:
    """Draws weights of the backbone as cells."""
    for i, kind in enumerate(kinds):
        x, y = left + 13.5 * (i % GRID_COLUMNS), top + 12.5 * (i // GRID_COLUMNS)
        yield box(kind, x, y, 11, 10, radius=1.5)


def _arrow(path: str) -> str:
    return f'<path class="line" marker-end="url(#tip)" d="{path}"/>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
