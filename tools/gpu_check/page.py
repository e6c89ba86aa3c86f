"""Writes docs/results/gpu.md from docs/results/gpu.json."""

import json
import textwrap
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from gpu_check.demo import ROOT

DATA, PAGE = ROOT / "docs/results/gpu.json", ROOT / "docs/results/gpu.md"
HEAD = Path(__file__).with_name("page.md")
WIDTH = 120  # of a line of text in the documents
NOT_YET = "Not measured yet. The commands below measure it."


def write_page(files: Sequence[Path] = ()) -> None:
    """Writes the page from gpu.json; if there is none, the page says so.

    Args:
        files: the gpu.json of several runs. Each adds the parts and figures that the files before
            it lack. Together they become docs/results/gpu.json.
    """
    if files:
        runs = [json.loads(file.read_text()) for file in files]
        DATA.write_text(json.dumps(merge(runs), indent=1) + "\n")
    found = json.loads(DATA.read_text()) if DATA.is_file() else None
    PAGE.write_text(page(found))


def merge(runs: Sequence[dict]) -> dict:
    """Merges several gpu.json: the first, with the parts and figures that it lacks."""
    merged: dict = {}
    for run in runs:
        parts = merged.get("parts", {})
        for name, part in run["parts"].items():
            parts.setdefault(name, {"commit": run["commit"], **part})
        merged |= {key: value for key, value in run.items() if key not in merged}
        merged["parts"] = parts
    return merged


def page(found: dict | None) -> str:
    """Formats the page from the content of gpu.json, or from None while there is none."""
    if found is None:
        return head(NOT_YET)
    tables = [head(state(found)), "## Parts\n", parts_table(found["parts"])]
    for key, (title, make) in TABLES.items():
        if found.get(key):
            tables += [f"\n## {title}\n", make(found[key])]
    return "\n".join(tables) + "\n"


def head(words: str) -> str:
    """Formats the constant part of the page, with the state of the measurements."""
    return HEAD.read_text().replace("{state}", words)


def state(found: dict) -> str:
    """Says which parts were measured on which device."""
    about = found.get("about", {})
    failed = [name for name, part in found["parts"].items() if part["status"] != "PASS"]
    dry = "This is a dry run on a CPU with toy models, so no number means anything."
    words = [dry] if found["dry_run"] else []
    versions = [
        f"{n} {about[n]}" for n in ("python", "torch", "transformers", "timm") if n in about
    ]
    driver = f" with driver {about['driver']}" if "driver" in about else ""
    words.append(f"The device is one {about.get('device', 'device')}{driver}.")
    words.append(f"The versions are {', '.join(versions)}.")
    words.append(commits(found))
    words.append(f"These parts failed: {', '.join(failed)}." if failed else "All parts passed.")
    words.append("[gpu.json](gpu.json) holds the numbers of this page.")
    return "\n".join(words)


def commits(found: dict) -> str:
    """Says at which commit each part ran, because a part may be measured again after a change."""
    by_commit: dict[str, list[str]] = {}
    for name, part in found["parts"].items():
        by_commit.setdefault(part.get("commit", found["commit"]), []).append(name)
    if len(by_commit) == 1:
        return f"Commit {found['commit']}."
    return "".join(f"Commit {each}: {', '.join(by_commit[each])}. " for each in by_commit).strip()


def parts_table(parts: dict[str, dict]) -> str:
    """Formats a line for each check."""
    lines = []
    for name, part in parts.items():
        for each in part["checks"]:
            mark = "met" if each["ok"] else "**missed**"
            lines.append([name, each["what"], mark, each["found"]])
    return table(["part", "requirement", "", "result"], lines)


def entries_table(text: str, columns: dict[str, tuple[str, str]], entries: list[dict]) -> str:
    """Formats a line for each entry, with a dash for a missing number."""
    lines = [[number(entry.get(key), form) for key, form in columns.values()] for entry in entries]
    return (f"{textwrap.fill(text, WIDTH)}\n\n" if text else "") + table(columns, lines)


def demo_table(found: dict) -> str:
    """Formats the demo's scores."""
    names = list(found["reference"]["mIoU"])
    models = [("trained on the CPU", found["reference"]["mIoU"])]
    models += [("trained on the GPU", found["scores"]["mIoU"])]
    if "on_cpu" in found:
        models.append(("trained on the GPU, tested on the CPU", found["on_cpu"]))
    return table(["", *names], [[title, *(f"{s[n]:.2f}" for n in names)] for title, s in models])


def camvid_table(runs: list[dict]) -> str:
    """Formats the scores of full fine-tuning and FisherTune."""
    names = list(runs[0]["mIoU"])
    lines = [
        [run["method"], f"{run['iterations']:,}", f"{run['seconds']:.0f}"]
        + [f"{run['mIoU'][name]:.2f}" for name in names]
        for run in runs
    ]
    text = (
        "Both methods ran at the same time with one seed. Half of the iterations are warm-up.\n\n"
    )
    return text + table(["method", "iterations", "s", *names], lines)


# The tables of entries, by key of gpu.json: the title, a text above the table, and the columns.
# Each column has a head, the key of its numbers in an entry, and their form.
ENTRIES: dict[str, tuple[str, str, dict[str, tuple[str, str]]]] = {
    "training": (
        "Steps",
        "DINOv2 ViT-L with random weights trains on batches of 4 images of 512 x 512. A step is an "
        "iteration with loading and hooks. *Peak* is the most memory that torch's allocator gave "
        "out, and *planned* is the memory that `fishertune_d2.plan` counts. The estimation "
        "measures F(x) and F(x') on 2 batches.",
        {
            "way": ("way", ""),
            "precision": ("precision", ""),
            "ms a step": ("step_ms", ".0f"),
            "ms of loading": ("data_ms", ".0f"),
            "images a second": ("images_per_second", ".1f"),
            "ms of kernels": ("kernel_ms", ".0f"),
            "launches": ("launches", ",d"),
            "waits": ("waits", "d"),
            "peak, GiB": ("peak_gib", ".1f"),
            "planned, GiB": ("planned_gib", ".1f"),
            "estimation, s": ("estimation_seconds", ".2f"),
            "estimation peak, GiB": ("estimation_peak_gib", ".1f"),
            "estimation planned, GiB": ("estimation_planned_gib", ".1f"),
        },
    ),
    "fisher": (
        "The Fisher information of a batch",
        "These peaks were measured while earlier estimates of 1.03 GiB each were in memory: one in "
        "the first line, then 2, 3, 4, 3 and 4. So they are too high. The script no longer keeps "
        "such estimates, but it has not run on a GPU since.",
        {
            "estimator": ("estimator", ""),
            "precision": ("precision", ""),
            "s for 4 images": ("seconds", ".3f"),
            "peak, GiB": ("peak_gib", ".1f"),
            "difference from the line above": ("difference", ".1e"),
            "5 % in common, on an eighth of the tensors": ("overlap", ".4f"),
        },
    ),
    "evaluation": (
        "Evaluation of an image of 2048 x 1024",
        "",
        {
            "precision": ("precision", ""),
            "windows at once": ("windows", ""),
            "ms an image": ("image_ms", ".0f"),
            "ms in the model": ("model_ms", ".0f"),
            "peak, GiB": ("peak_gib", ".1f"),
        },
    ),
    "ranking": (
        "Ranking",
        "",
        {
            "FISHER.FORM": ("form", ""),
            "scores": ("scores", ",d"),
            "s to score": ("scoring_seconds", ".2f"),
            "s to select": ("selecting_seconds", ".2f"),
            "peak, GiB": ("peak_gib", ".1f"),
        },
    ),
    "agreement": (
        "GPU against CPU",
        "",
        {
            "quantity": ("what", ""),
            "relative difference": ("difference", ".1e"),
            "5 % in common": ("overlap", ".4f"),
        },
    ),
}
# By key of gpu.json: the title, and the function that makes a table of the value.
TABLES: dict[str, tuple[str, Callable]] = {
    **{
        key: (title, partial(entries_table, text, columns))
        for key, (title, text, columns) in ENTRIES.items()
    },
    "demo": ("The demo", demo_table),
    "camvid": ("CamVid", camvid_table),
}


def number(value: float | None, form: str) -> str:
    """Formats a number, or a dash if there is none."""
    return "-" if value is None else format(value, form)


def table(head: Iterable[str], body: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table; this file needs only Python's standard library."""
    head = list(head)
    lines = [head, ["---"] * len(head), *body]
    cells = ([str(cell).replace("|", "/") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
