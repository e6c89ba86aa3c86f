"""The style and the shapes that the drawings of the README share, in light and in dark."""

# The page around a drawing may be light or dark, so a drawing has its own background.
STYLE = """
  .page { fill: #ffffff; } .panel { fill: #f5f6f7; }
  text { font: 14px system-ui, -apple-system, "Segoe UI", Roboto, Helvetica, Arial, sans-serif;
         fill: #1d2126; }
  .head { font-size: 18px; font-weight: 600; } .quiet { fill: #5b6268; font-size: 13px; }
  .bold { font-weight: 600; } .middle { text-anchor: middle; } .right { text-anchor: end; }
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


def drawing(width: int, height: int, title: str, *parts: str) -> str:
    """Puts parts onto a background.

    Args:
        width: The width in pixels.
        height: The height in pixels.
        title: The text for readers who do not see the drawing.
        parts: SVG elements, in the order in which they are painted.

    Returns:
        The content of the SVG file.
    """
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{width}" height="{height}" rx="12"/>',
            *parts,
            "</svg>\n",
        ]
    )


def box(kind: str, left: float, top: float, width: float, height: float, radius: float = 6) -> str:
    """Returns a rectangle."""
    size = f'width="{width:g}" height="{height:g}"'
    return f'<rect class="{kind}" x="{left:g}" y="{top:g}" {size} rx="{radius:g}"/>'


def text(x: float, y: float, content: str, kind: str = "") -> str:
    """Returns a line of text."""
    return f'<text class="{kind}" x="{x:g}" y="{y:g}" xml:space="preserve">{content}</text>'
