"""The tables in docs/results/ are those that their commands write."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from fishertune_d2.analysis import methods
from fishertune_d2.bench.__main__ import main
from fishertune_d2.bench.learning_rates import read_choices
from fishertune_d2.config import CONFIGS, read_config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs/results"


def _commands(page: str, program: str) -> list[str]:
    text = (RESULTS / page).read_text()
    return re.findall(rf"^python -m fishertune_d2\.{program} (.*)$", text, re.MULTILINE)


REPORTS = [
    (page, command)
    for page in ("tables.md", "selection.md", "when.md")
    for command in _commands(page, "bench")
    if "--report" in command
]
METHODS = _commands("selection.md", r"analysis\.methods")


@pytest.mark.parametrize(("page", "command"), REPORTS)
def test_the_page_shows_what_the_report_writes(page, command, tmp_path, capsys):
    words = command.split()
    table = ROOT / words[words.index("--output") + 1]
    copy = Path(shutil.copy(table, tmp_path))
    assert main([*words[: words.index("--output")], "--output", str(copy)]) == 0
    said = capsys.readouterr().out.splitlines()
    shown = [line for line in said if re.match(r"\||\w+: [\d.]+ of ", line)]
    assert shown
    assert not {*shown} - {*(RESULTS / page).read_text().splitlines()}


@pytest.mark.parametrize("command", METHODS)
def test_the_page_shows_what_the_table_of_methods_writes(command, tmp_path, capsys, monkeypatch):
    words = command.split()
    words = [*words[: words.index("--output")], "--output", str(tmp_path / "picture.png")]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["methods", *words])
    methods.main()
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    page = (RESULTS / "selection.md").read_text()
    assert "fig5.png" in command or "\n".join(shown) in page  # of fig5 it shows the figure alone


def test_every_study_has_its_command():
    written = {Path(word).name for _, c in REPORTS for word in c.split() if word.endswith(".jsonl")}
    written |= {Path(word).name for c in METHODS for word in c.split() if word.endswith(".jsonl")}
    assert written == {table.name for table in RESULTS.glob("*.jsonl")}


def test_configs_have_the_learning_rates_that_were_chosen():
    choices = read_choices(RESULTS / "table1_camvid.jsonl/dinov2_vits")
    assert choices
    for name, choice in choices.items():
        cfg = read_config(str(CONFIGS / f"camvid/{name}.yaml"))
        assert choice["rate"] == cfg.SOLVER.BACKBONE_MULTIPLIER, name
