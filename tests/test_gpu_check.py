"""tools/gpu_check.sh, its carry.py and the page of results: tried out where there is no GPU."""

import argparse
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = [str(ROOT / "tools"), str(ROOT / "benchmarks")]


@pytest.fixture(autouse=True)
def tools(monkeypatch):
    monkeypatch.setattr(sys, "path", [*FOLDERS, *sys.path])


@pytest.fixture
def part(tmp_path):
    from gpu_check.parts import Part

    args = argparse.Namespace(output=tmp_path, carried=tmp_path, device="cpu", demo=[])
    return Part("demo", args, time.monotonic() + 60, dict(os.environ), tmp_path)


def test_a_dry_run_measures_all_that_the_page_shows(tmp_path):
    from gpu_check.page import page

    measuring = ("steps", "evaluation", "fisher", "ranking")
    run = subprocess.run(
        ["tools/gpu_check.sh", "--dry-run", "--output", tmp_path, "--parts", *measuring],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    lines = [line.split()[:2] for line in run.stdout.splitlines()]
    assert lines[:-1] == [["PASS", name] for name in ("setup", *measuring)]
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert found["dry_run"] and found["about"]["torch"] and "commit" in found
    steps = {row["way"]: row["step_ms"] for row in found["training"]}
    assert steps.keys() == {"warm-up", "fishertune", "fishertune, neurons", "full", "lora"}
    assert all(0 < milliseconds < 60_000 for milliseconds in steps.values())
    assert {row["estimator"] for row in found["fisher"]} == {"diagonal", "diagonal_loop"}
    assert {row["windows"] for row in found["evaluation"]} == {1, 6}
    assert [row["form"] for row in found["ranking"]] == ["balanced", "rank"]
    text = page(found)
    assert "no number means anything" in text
    for title in ("Steps", "The Fisher information of a batch", "Ranking"):
        assert f"\n## {title}\n" in text
    assert f"| lora | float32 | {steps['lora']:.0f} |" in text


def test_the_page_is_what_its_command_writes():
    from gpu_check.page import DATA, PAGE, page

    found = json.loads(DATA.read_text()) if DATA.is_file() else None
    assert PAGE.read_text() == page(found)
    assert ("Not measured yet" in PAGE.read_text()) == (found is None)


def test_the_page_says_what_each_part_checks():
    from gpu_check.page import page
    from gpu_check.parts import GROUPS, PARTS

    for name in PARTS:
        assert f"\n| {name} | " in page(None)
    assert {name for group in GROUPS for name in group} == PARTS.keys()


def test_a_second_run_adds_what_the_first_lacks():
    from gpu_check.page import commits, merge

    first = {"commit": "a", "parts": {"setup": {"n": 1}, "demo": {"n": 2}}, "demo": 3}
    second = {"commit": "b", "parts": {"setup": {"n": 4}, "camvid": {"n": 5}}, "camvid": 6}
    merged = merge([first, second])
    assert {name: part["n"] for name, part in merged.pop("parts").items()} == {
        "setup": 1, "demo": 2, "camvid": 5
    }  # fmt: skip
    assert merged == {"commit": "a", "demo": 3, "camvid": 6}
    assert commits(merge([first, second])) == "Commit a: setup, demo. Commit b: camvid."
    assert commits(merge([first])) == "Commit a."


def _write_demo(output: Path, miou: float, loss: float) -> None:
    output.mkdir()
    scores = {"source": {"day": miou}, "targets": {"night": miou}}
    (output / "results.json").write_text(json.dumps(scores))
    (output / "metrics.json").write_text(json.dumps({"iteration": 19, "total_loss": loss}) + "\n")


@pytest.mark.parametrize(
    ("on_gpu", "loss", "again", "missed"),
    [
        (22.0, 30.1, 22.05, []),
        (12.0, 30.1, 12.0, ["mean mIoU within 4.0 points of a CPU's"]),
        (22.0, 33.0, 22.0, ["loss after 20 iterations within 2% of a CPU's"]),
        (22.0, 30.1, 21.0, ["the same weights on the CPU: mIoU within 0.3 points"]),
    ],
)
def test_scores_that_differ_from_the_cpu_are_told(
    part, tmp_path, monkeypatch, on_gpu, loss, again, missed
):
    from gpu_check import parts

    (tmp_path / "weights.safetensors").touch()
    reference = {"mIoU": {"day": 21.0, "night": 21.0}, "losses": {"19": 30.0}}
    (tmp_path / "reference.json").write_text(json.dumps(reference))

    def python(*words):
        evaluates = "--eval-only" in words
        output = Path(words[words.index("OUTPUT_DIR") + 1])
        _write_demo(output, again if evaluates else on_gpu, loss)
        return 0

    monkeypatch.setattr(part, "python", python)
    parts.demo(part)
    assert len(part.checks) == 3
    assert [each["what"] for each in part.checks if not each["ok"]] == missed


def test_a_part_ends_when_its_time_is_over_and_says_so(part, monkeypatch, capsys):
    from gpu_check import check

    def endless(part):
        part.figures["first"] = 1
        part.python("-c", "import time; time.sleep(60)")

    monkeypatch.setitem(check.PARTS, "demo", (endless, 0))
    part.deadline = time.monotonic() + 0.5
    result = check.run_part(part)
    assert result["status"] == "FAIL" and result["seconds"] < 30
    assert "its time is over" in capsys.readouterr().out
    assert part.figures == {"first": 1}


def test_without_the_carried_folder_the_remedy_is_named(part, capsys):
    from gpu_check.check import run_part

    assert run_part(part)["status"] == "FAIL"
    assert "weights.safetensors: run tools/gpu_check/carry.py" in capsys.readouterr().out


def test_a_plan_far_from_the_peak_is_told():
    from gpu_check.check import compare_plan

    row = {"way": "full", "precision": "TF32", "peak_gib": 10.0}
    figures = {"training": [row], "plan": [{"way": "full", "precision": "float32", "gib": 9.0}]}
    assert [each["ok"] for each in compare_plan(figures)] == [True]
    assert row["planned_gib"] == 9.0
    figures["plan"][0]["gib"] = 5.0
    assert [each["ok"] for each in compare_plan(figures)] == [False]


def test_too_many_waits_and_launches_are_told():
    from gpu.training import training_checks

    rows = [
        {"way": "full", "precision": "TF32", "launches": 1000, "waits": 4},
        {"way": "fishertune", "precision": "TF32", "launches": 1020, "waits": 4},
    ]
    assert all(each["ok"] for each in training_checks(rows)) and len(training_checks(rows)) == 3
    rows[1] |= {"launches": 1200, "waits": 5}
    found = {each["what"]: each["found"] for each in training_checks(rows) if not each["ok"]}
    assert sorted(found.values()) == ["1.200", "5 (fishertune TF32)"]


def _wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Dist: {need}" for need in requires]
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}-{version}.dist-info/METADATA", "\n".join(lines) + "\n")
        archive.writestr(f"{name}/__init__.py", "")


def test_a_wheel_whose_needs_are_not_carried_is_told(tmp_path):
    from gpu_check.carry import missing

    other = 'importlib-resources; python_version < "3.9"'
    _wheel(tmp_path, "one", "1.0", "two>=2", "numpy", other, 'ruff; extra == "dev"')
    assert missing(tmp_path, {"numpy"}) == [
        "one-1.0-py3-none-any.whl requires two>=2, which is not carried"
    ]
    _wheel(tmp_path, "two", "1.5")
    assert missing(tmp_path, {"numpy"}) == [
        "one-1.0-py3-none-any.whl requires two>=2, but two-1.5-py3-none-any.whl is carried"
    ]
    (tmp_path / "two-1.5-py3-none-any.whl").unlink()
    _wheel(tmp_path, "two", "2.1")
    assert missing(tmp_path, {"numpy"}) == []


def test_what_the_machine_has_is_not_wanted():
    from gpu_check.carry import HAS, wanted

    names = {need.name for need in wanted(set(HAS))}
    assert {"fvcore", "omegaconf", "pycocotools"} <= names
    assert not names & {"torch", "numpy", "pytest-xdist", "jupytext", "ruff", "mypy"}
