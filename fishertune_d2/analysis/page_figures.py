"""Draws the figures of the page as data URIs, so that the page needs no other file.

Curves have no background; their colours are readable on light and on dark pages.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fishertune_d2.run import Run

_GREY = "#7d7d7d"
_LINES = ("#2f7fc1", "#d9771c", "#2f9e6e", "#a45fc8")
_WIDTH = 1600  # of a picture in pixels; wider ones are scaled down
_PANELS = ("image", "label", "prediction")
_MARGIN = 3  # pixels left of a legend's names, which are white

Series = Sequence[tuple[int, float]]


def draw_curves(run: Run) -> dict[str, str]:
    """Draws the losses, learning rates, tuned share and scores that a run logged, by title."""
    losses = {"total": run.series("total_loss")} | {
        name: run.series(f"loss_{key}")
        for name, key in (("class", "ce"), ("mask", "mask"), ("dice", "dice"))
    }
    rates = {"decoder": run.series("lr"), "backbone": run.series("lr_backbone")}
    share = [(i, 100 * value) for i, value in run.series("fisher/tuned_share")]
    scores = run.score_series()
    charts = [
        ("Loss, and its parts for the final prediction", losses, True),
        ("Learning rate", rates, False),
        ("Tuned share of the backbone, in %", {"": share}, False),
        # A single score makes no curve, and the table of scores has it.
        ("mIoU during training", {k: v for k, v in scores.items() if len(v) > 1}, False),
    ]
    return {
        title: _draw_lines(run, {k: v for k, v in lines.items() if v}, logarithmic)
        for title, lines, logarithmic in charts
        if any(lines.values())
    }


def _draw_lines(run: Run, lines: Mapping[str, Series], logarithmic: bool) -> str:
    warmup, end = run.config["TUNING.WARMUP_ITERS"], run.config["SOLVER.MAX_ITER"]
    first = min(run.metrics)
    start = 0 if first < warmup else warmup  # a run that took another's warm-up logs none
    with matplotlib.rc_context(
        {
            "axes.edgecolor": _GREY,
            "axes.labelcolor": _GREY,
            "axes.spines.right": False,
            "axes.spines.top": False,
            "font.size": 9,
            "text.color": _GREY,
            "text.parse_math": False,  # names may contain dollar signs
            "xtick.color": _GREY,
            "ytick.color": _GREY,
        }
    ):
        figure = Figure(figsize=(3.7, 2.5), layout="constrained")
        axes = figure.subplots()
        for k, (name, series) in enumerate(lines.items()):
            marker = "o" if len(series) < 3 else None
            axes.plot(
                *zip(*series, strict=True),
                color=_LINES[k % len(_LINES)],
                label=name,
                linewidth=1.6,
                marker=marker,
                markersize=3,
            )
        axes.set_xlim(start, end)
        axes.set_xlabel("iteration")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", color=_GREY, alpha=0.2, linewidth=0.6)
        if logarithmic:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter("{x:g}")
        else:
            axes.set_ylim(bottom=0)
            axes.ticklabel_format(axis="y", scilimits=(-2, 4))
        if start < warmup < end:
            axes.axvspan(start, warmup, color=_GREY, alpha=0.1, linewidth=0)
        for left, right, stage in ((start, warmup, "warm-up"), (warmup, end, "tuning")):
            if left < right:
                axes.annotate(
                    stage, ((left + right) / 2, 1), xycoords=("data", "axes fraction"),
                    xytext=(0, 3), textcoords="offset points", ha="center", fontsize=8,
                )  # fmt: skip
        if len(lines) > 1:
            figure.legend(
                loc="outside lower center", frameon=False, fontsize=8, ncols=4, handlelength=1.2
            )
        file = BytesIO()
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return _uri(file.getvalue(), "image/svg+xml")


def draw_map(draw: Callable[[Path], None]) -> str:
    """Draws a map that ``draw`` writes as PNG to a path."""
    with TemporaryDirectory() as folder, matplotlib.rc_context({"text.parse_math": False}):
        path = Path(folder, "map.png")
        draw(path)
        return _uri(path.read_bytes(), "image/png")


def split_picture(path: Path) -> list[Image.Image]:
    """Cuts a picture of ``evaluation.label_pictures.draw_comparison`` into its parts.

    Args:
        path: The PNG: image, label and prediction side by side, and below them a legend.

    Returns:
        The image, the label, the prediction and the legend, whose height may be 0.
    """
    with Image.open(path) as file:
        whole = file.convert("RGB")
    # The left margin of the legend is white, down to the last line.
    margin = np.asarray(whole)[:, :_MARGIN].min(axis=(1, 2))
    panel_lines = np.flatnonzero(margin < 255)
    bottom = int(panel_lines[-1]) + 1 if len(panel_lines) else whole.height
    width = whole.width // len(_PANELS)
    parts = [whole.crop((k * width, 0, (k + 1) * width, bottom)) for k in range(len(_PANELS))]
    return [*parts, whole.crop((0, bottom, whole.width, whole.height))]


def read_picture(path: Path) -> tuple[dict[str, str], str]:
    """Reads a picture that an evaluation drew, taken apart so that a phone can show it.

    Args:
        path: The PNG.

    Returns:
        The panels by their titles, and the legend, which is empty if the picture has none.
    """
    *panels, legend = split_picture(path)
    width = _WIDTH // len(_PANELS)
    shown = {title: _webp(panel, width) for title, panel in zip(_PANELS, panels, strict=True)}
    return shown, _webp(legend, _WIDTH) if legend.height else ""


def _webp(picture: Image.Image, width: int) -> str:
    if picture.width > width:
        height = max(1, round(picture.height * width / picture.width))
        picture = picture.resize((width, height), Image.Resampling.LANCZOS)
    file = BytesIO()
    picture.save(file, "WEBP", quality=82)
    return _uri(file.getvalue(), "image/webp")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
