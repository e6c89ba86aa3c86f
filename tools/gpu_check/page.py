"""Writes docs/results/gpu.md from docs/results/gpu.json."""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path

from gpu_check.demo import ROOT

DATA, PAGE = ROOT / "docs/results/gpu.json", ROOT / "docs/results/gpu.md"
HEAD = Path(__file__).with_name("page.md")
NOT_YET = "Not measured yet. The commands below measure it."


def write_page(files: Sequence[Path] = ()) -> None:
    """Writes the page from gpu.json; without one, the page says so.

    Args:
        files: what runs of the check wrote; a later one goes before an earlier one, part by
            part. They become docs/results/gpu.json.
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
    words = ["A dry run on a CPU, with toys: no number means anything."] if found["dry_run"] else []
    versions = [
        f"{n} {about[n]}" for n in ("python", "torch", "transformers", "timm") if n in about
    ]
    driver = f", driver {about['driver']}" if "driver" in about else ""
    words.append(f"Measured on one {about.get('device', 'device')}{driver}; {', '.join(versions)}.")
    words.append(commits(found))
    words.append(f"Failed: {', '.join(failed)}." if failed else "All parts passed.")
    words.append("The numbers are those of [gpu.json](gpu.json).")
    return "\n".join(words)


def commits(found: dict) -> str:
    """Says at which commit each part ran, since a part may be measured again after a change."""
    by_commit: dict[str, list[str]] = {}
    for name, part in found["parts"].items():
        by_commit.setdefault(part.get("commit", found["commit"]), []).append(name)
    if len(by_commit) == 1:
        return f"Commit {found['commit']}."
    return "".join(f"Commit {each}: {', '.join(by_commit[each])}. " for each in by_commit).strip()


def parts_table(parts: dict[str, dict]) -> str:
    """Formats a line for each check."""
    rows = []
    for name, part in parts.items():
        for each in part["checks"]:
            mark = "met" if each["ok"] else "**missed**"
            rows.append([name, each["what"], mark, each["found"]])
    return table(["part", "check", "", "found"], rows)


def rows_table(text: str, columns: dict[str, tuple[str, str]], rows: list[dict]) -> str:
    """Formats a line for each entry, with a dash where a number is missing."""
    body = [[number(row.get(key), form) for key, form in columns.values()] for row in rows]
    return (f"{text}\n\n" if text else "") + table(columns, body)


def demo_table(found: dict) -> str:
    """Formats the demo's scores."""
    names = list(found["reference"]["mIoU"])
    rows = [("trained on the CPU", found["reference"]["mIoU"])]
    rows += [("trained on the GPU", found["scores"]["mIoU"])]
    rows += [("the latter, tested on the CPU", found["on_cpu"])] if "on_cpu" in found else []
    return table(["", *names], [[title, *(f"{s[n]:.2f}" for n in names)] for title, s in rows])


def camvid_table(rows: list[dict]) -> str:
    """Formats the scores of full fine-tuning and FisherTune."""
    names = list(rows[0]["mIoU"])
    body = [
        [row["method"], f"{row['iterations']:,}", f"{row['seconds']:.0f}"]
        + [f"{row['mIoU'][name]:.2f}" for name in names]
        for row in rows
    ]
    text = "Both at the same time, each with a warm-up of half the iterations; one seed.\n\n"
    return text + table(["method", "iterations", "s", *names], body)


# By key of gpu.json whose rows become a table: title, a text above it, and by the head of each
# column the rows' key and the number's form.
ROWS: dict[str, tuple[str, str, dict[str, tuple[str, str]]]] = {
    "training": (
        "Steps",
        "DINOv2 ViT-L, batches of 4 images of 512 x 512, random weights; an iteration with loading "
        "and hooks. GiB are what torch's allocator gave out at most, and what the plan counts. "
        "The estimation is that of 2 batches, x and x'.",
        {
            "way": ("way", ""),
            "precision": ("precision", ""),
            "ms a step": ("step_ms", ".0f"),
            "of these loading": ("data_ms", ".0f"),
            "images a second": ("images_per_second", ".1f"),
            "kernels, ms": ("kernel_ms", ".0f"),
            "launches": ("launches", ",d"),
            "waits": ("waits", "d"),
            "peak, GiB": ("peak_gib", ".1f"),
            "planned": ("planned_gib", ".1f"),
            "estimation, s": ("estimation_seconds", ".2f"),
            "its peak, GiB": ("estimation_peak_gib", ".1f"),
            "its planned": ("estimation_planned_gib", ".1f"),
        },
    ),
    "fisher": (
        "The Fisher information of a batch",
        "",
        {
            "estimator": ("estimator", ""),
            "precision": ("precision", ""),
            "s for 4 images": ("seconds", ".3f"),
            "peak, GiB": ("peak_gib", ".1f"),
            "difference from the one above": ("difference", ".1e"),
            "same 5 %, of an eighth of the layers": ("overlap", ".4f"),
        },
    ),
    "evaluation": (
        "Evaluation of an image of 2048 x 1024",
        "",
        {
            "precision": ("precision", ""),
            "windows at once": ("windows", ""),
            "ms an image": ("image_ms", ".0f"),
            "of it model": ("model_ms", ".0f"),
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
            "what": ("what", ""),
            "relative difference": ("difference", ".1e"),
            "same 5 %": ("overlap", ".4f"),
        },
    ),
}
# By key of gpu.json: title, and what makes a table of the value.
TABLES: dict[str, tuple[str, Callable]] = {
    **{
        key: (title, partial(rows_table, text, columns))
        for key, (title, text, columns) in ROWS.items()
    },
    "demo": ("The demo", demo_table),
    "camvid": ("CamVid", camvid_table),
}


def number(value: float | None, form: str) -> str:
    """Formats a number, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def table(head: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table; this file imports the standard library alone."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    cells = ([str(cell).replace("|", "/") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)
