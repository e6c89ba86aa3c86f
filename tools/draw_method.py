#!/usr/bin/env python
"""Draws the method as a diagram of three stages, for the README and the notebooks.

python tools/draw_method.py     # writes docs/images/method.svg
"""

import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the package need not be installed

from fishertune_d2.fisher import tuned_share  # noqa: E402

PICTURE = ROOT / "docs/images/method.svg"
WIDTH, HEIGHT = 960, 432
COLUMNS = (20, 335, 650)  # left edges of the stages
STAGE = 290  # width of one
D_MIN, D_MAX = 0.01, 0.05  # the defaults of TUNING.D_MIN and TUNING.D_MAX
GRID_COLUMNS, GRID_ROWS = 12, 6

# The page behind the picture may be light or dark, so the picture brings its own background.
STYLE = """
  .page { fill: #ffffff; } .panel { fill: #f5f6f7; }
  text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
         fill: #1d2126; }
  .head { font-size: 18px; font-weight: 600; } .quiet { fill: #5b6268; font-size: 13px; }
  .middle { text-anchor: middle; }
  .frozen { fill: #cfd8e3; } .trains { fill: #f2b36f; } .measured { fill: #b9dcc6; }
  .plain { fill: #ffffff; stroke: #b4bac0; }
  .line { fill: none; stroke: #5b6268; stroke-width: 1.6; } .tip { fill: #5b6268; }
  .curve { fill: none; stroke: #c8701a; stroke-width: 2.4; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #15181b; } .panel { fill: #1f2428; } text { fill: #e4e6e8; }
    .quiet { fill: #a3abb2; }
    .frozen { fill: #3c4a5c; } .trains { fill: #a8611b; } .measured { fill: #2f6045; }
    .plain { fill: #15181b; stroke: #565e66; }
    .line { stroke: #a3abb2; } .tip { fill: #a3abb2; } .curve { stroke: #e59a4b; }
  }
"""


def draw() -> str:
    """Returns the diagram as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>The three stages of FisherTune</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path class="tip" d="M0 0L8 4L0 8z"/></marker></defs>',
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>',
        *_warmup(COLUMNS[0]),
        *_estimation(COLUMNS[1]),
        *_tuning(COLUMNS[2]),
        *_arrows_between_stages(),
        *_legend(),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _warmup(left: int) -> Iterator[str]:
    middle = left + STAGE // 2
    yield from _panel(left, "T1  Warm-up", "Only the decoder trains.")
    yield from _box(left + 20, 98, 250, 36, "plain", "source images x")
    yield _arrow(f"M{middle} 134V150")
    yield from _box(left + 20, 152, 250, 112, "plain", "backbone", title_at=172)
    yield from _grid(left + 64, 182, ["frozen"] * GRID_COLUMNS * GRID_ROWS)
    yield _arrow(f"M{middle} 264V280")
    yield from _box(left + 20, 282, 250, 36, "trains", "decoder")
    yield _text(middle, 346, "no backward pass through the backbone", "quiet middle")


def _estimation(left: int) -> Iterator[str]:
    yield from _panel(left, "T2  Estimation", "F is measured; no weight changes.")
    for x, image, fisher in ((left + 20, "images x", "F(x)"), (left + 155, "shifted x′", "F(x′)")):
        middle = x + 57
        yield from _box(x, 98, 115, 36, "plain", image)
        yield _arrow(f"M{middle} 134V150")
        yield from _box(x, 152, 115, 36, "measured", fisher)
        yield _arrow(f"M{middle} 188V204")
    yield _arrow(f"M{left + 135} 116H{left + 153}")
    yield _text(left + 145, 92, "Eq. 6", "quiet middle")
    yield from _box(left + 20, 206, 250, 36, "measured", "DRF: F(x) and its change at x′")
    yield _arrow(f"M{left + 145} 242V258")
    yield from _ranking(left + 20, 260)
    yield _text(left + 145, 346, "all candidate weights, ranked by DRF", "quiet middle")


def _ranking(left: int, top: int) -> Iterator[str]:
    """Bars that fall from left to right; the first ones are selected."""
    yield f'<rect class="plain" x="{left}" y="{top}" width="250" height="58" rx="6"/>'
    bars, selected = 30, 5
    for i in range(bars):
        height = round(44 / (1 + i / 4)) + 3
        kind = "trains" if i < selected else "frozen"
        x, y = left + 12 + 7.6 * i, top + 52 - height
        yield f'<rect class="{kind}" x="{x:g}" y="{y}" width="6" height="{height}"/>'
    cut = left + 12 + 7.6 * selected - 0.8
    yield f'<path class="line" stroke-dasharray="4 3" d="M{cut:g} {top + 4}V{top + 54}"/>'
    yield _text(cut + 8, top + 20, "mask: the highest 5 %", "quiet")


def _tuning(left: int) -> Iterator[str]:
    middle = left + STAGE // 2
    yield from _panel(left, "T3  Tuning", "Decoder and selected weights train.")
    yield from _box(left + 20, 98, 250, 36, "plain", "source images x")
    yield _arrow(f"M{middle} 134V150")
    yield from _box(left + 20, 152, 250, 112, "plain", "backbone", title_at=172)
    chosen = {3, 10, 17, 25, 29, 32, 38, 44, 51, 62}
    cells = GRID_COLUMNS * GRID_ROWS
    yield from _grid(left + 28, 182, ["trains" if i in chosen else "frozen" for i in range(cells)])
    yield from _share_curve(left + 204, 176)
    yield _arrow(f"M{middle} 264V280")
    yield from _box(left + 20, 282, 250, 36, "trains", "decoder")
    yield _text(middle, 346, "all other weights keep their value to the bit", "quiet middle")


def _share_curve(left: int, top: int) -> Iterator[str]:
    """The share of the weights that train, over the stage."""
    width, height = 50, 62
    shares = [tuned_share(i / 20, D_MIN, D_MAX) / D_MAX for i in range(21)]
    points = [
        f"{left + width * i / 20:.1f} {top + height * (1 - share):.1f}"
        for i, share in enumerate(shares)
    ]
    yield f'<path class="line" d="M{left} {top}V{top + height}H{left + width}"/>'
    yield f'<path class="curve" d="M{"L".join(points)}"/>'
    bounds = f"{100 * D_MIN:.0f} to {100 * D_MAX:.0f} %"
    yield _text(left + 24, top + height + 18, bounds, "quiet middle")


def _arrows_between_stages() -> Iterator[str]:
    first, second, third = COLUMNS
    yield _arrow(f"M{first + 270} 300H{first + 302}V170H{second + 18}")
    yield _arrow(f"M{second + 270} 289H{second + 302}V208H{third + 18}")


def _legend() -> Iterator[str]:
    entries = (("frozen", "frozen"), ("trains", "trains"), ("measured", "measured"))
    for i, (kind, label) in enumerate(entries):
        x = 36 + 110 * i
        yield f'<rect class="{kind}" x="{x}" y="394" width="16" height="16" rx="3"/>'
        yield _text(x + 24, 407, label, "quiet")
    note = "F: Fisher information (Eq. 8, 9)     DRF: domain-related Fisher information (Eq. 15)"
    yield f'<text class="quiet" x="924" y="407" text-anchor="end" xml:space="preserve">{note}</text>'


def _panel(left: int, title: str, subtitle: str) -> Iterator[str]:
    yield f'<rect class="panel" x="{left}" y="20" width="{STAGE}" height="346" rx="10"/>'
    yield _text(left + 20, 48, title, "head")
    yield _text(left + 20, 70, subtitle, "quiet")


def _box(
    left: int, top: int, width: int, height: int, kind: str, title: str, title_at: int | None = None
) -> Iterator[str]:
    yield f'<rect class="{kind}" x="{left}" y="{top}" width="{width}" height="{height}" rx="6"/>'
    yield _text(left + width / 2, title_at or top + height / 2 + 5, title, "middle")


def _grid(left: int, top: int, kinds: list[str]) -> Iterator[str]:
    """The backbone's weights, a cell each."""
    for i, kind in enumerate(kinds):
        x, y = left + 13.5 * (i % GRID_COLUMNS), top + 12.5 * (i // GRID_COLUMNS)
        yield f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="11" height="10" rx="1.5"/>'


def _arrow(path: str) -> str:
    return f'<path class="line" marker-end="url(#tip)" d="{path}"/>'


def _text(x: float, y: float, content: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:g}" y="{y:g}">{content}</text>'


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))
