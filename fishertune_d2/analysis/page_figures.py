"""The figures of the page, each as a data URI, so that the page needs no other file.

The curves are drawn on nothing, in colours that can be read on a light and on a dark page.
"""

from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from fishertune_d2.run import Run

_GREY = "#7d7d7d"
_LINES = ("#2f7fc1", "#d9771c", "#2f9e6e", "#a45fc8")
_WIDTH = 1600  # of a picture; wider ones are scaled down

Series = Sequence[tuple[int, float]]


@dataclass(frozen=True)
class Curve:
    """A figure of the page.

    Attributes:
        title: what it shows.
        uri: the figure.
    """

    title: str
    uri: str


def draw_curves(run: Run) -> list[Curve]:
    """Draws what training logged: losses, learning rates, the share tuned, scores on the way."""
    losses = {"total": run.series("total_loss")} | {
        name: run.series(f"loss_{key}")
        for name, key in (("class", "ce"), ("mask", "mask"), ("dice", "dice"))
    }
    rates = {"decoder": run.series("lr"), "backbone": run.series("lr_backbone")}
    share = [(i, 100 * value) for i, value in run.series("fisher/tuned_share")]
    names = dict.fromkeys(key for numbers in run.metrics.values() for key in numbers)
    ending = "/sem_seg/mIoU"
    scores = {key.removesuffix(ending): run.series(key) for key in names if key.endswith(ending)}
    charts = [
        ("Loss, and its parts for the final prediction", losses, True),
        ("Learning rate", rates, False),
        ("Tuned share of the backbone, in %", {"": share}, False),
        # One score is in the table.
        ("mIoU during training", {k: v for k, v in scores.items() if len(v) > 1}, False),
    ]
    return [
        Curve(title, _draw_lines(run, {k: v for k, v in lines.items() if v}, logarithmic))
        for title, lines, logarithmic in charts
        if any(lines.values())
    ]


def _draw_lines(run: Run, lines: Mapping[str, Series], logarithmic: bool) -> str:
    warmup, end = run.config["TUNING.WARMUP_ITERS"], run.config["SOLVER.MAX_ITER"]
    first = min(run.metrics)
    start = 0 if first < warmup else warmup  # else the warm-up was another run's
    style = {
        "axes.edgecolor": _GREY,
        "axes.labelcolor": _GREY,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "font.size": 9,
        "text.color": _GREY,
        "text.parse_math": False,  # a name may hold a dollar
        "xtick.color": _GREY,
        "ytick.color": _GREY,
    }
    with matplotlib.rc_context(style):
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
    """Takes a picture of the analysis.

    Args:
        draw: writes a PNG to the path it is given.
    """
    with TemporaryDirectory() as folder, matplotlib.rc_context({"text.parse_math": False}):
        path = Path(folder, "map.png")
        draw(path)
        return _uri(path.read_bytes(), "image/png")


def shrink(path: Path) -> str:
    """Reads a picture, for a page that is to be sent: at most 1600 pixels wide, as WebP."""
    with Image.open(path) as picture:
        picture = picture.convert("RGB")
        if picture.width > _WIDTH:
            height = round(picture.height * _WIDTH / picture.width)
            picture = picture.resize((_WIDTH, height), Image.Resampling.LANCZOS)
        file = BytesIO()
        picture.save(file, "WEBP", quality=82)
    return _uri(file.getvalue(), "image/webp")


def _uri(content: bytes, kind: str) -> str:
    return f"data:{kind};base64,{b64encode(content).decode()}"
