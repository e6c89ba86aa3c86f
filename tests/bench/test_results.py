"""What docs/results/tables.md shows is what its commands write from what the runs left."""

import re
import shutil
from pathlib import Path

import pytest

from fishertune_d2.bench.__main__ import main
from fishertune_d2.bench.choices import read_choices
from fishertune_d2.config import CONFIGS, read_config

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/results/tables.md").read_text().splitlines()
COMMANDS = [
    match[1]
    for line in PAGE
    if (match := re.match(r"python -m fishertune_d2\.bench (.* --report .*)", line))
]


@pytest.mark.parametrize("command", COMMANDS)
def test_it_shows_what_the_command_writes(command, tmp_path, capsys):
    words = command.split()
    folder = ROOT / words[words.index("--output") + 1]
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.md", "*.csv", "*.png"))
    assert main([*words[: words.index("--output")], "--output", str(copy)]) == 0
    said = capsys.readouterr().out.splitlines()
    shown = [line for line in said if re.match(r"\||\w+: [\d.]+ of ", line)]
    assert shown
    assert not {*shown} - {*PAGE}
    for file in [*copy.glob("*.md"), *copy.glob("*.csv"), *copy.rglob("choices.json")]:
        name = file.relative_to(copy)
        assert file.read_text() == (folder / name).read_text(), f"run it again: {command}"


def test_every_table_has_its_command():
    for table in (ROOT / "docs/results").glob("*/**/*.md"):
        assert any(
            command.endswith(f"--output {table.parent.relative_to(ROOT)}")
            and "--search" not in command
            and ("--test" in command) == ("_test" in table.stem)
            for command in COMMANDS
        ), table


def test_configs_have_the_learning_rates_that_were_chosen():
    choices = read_choices(ROOT / "docs/results/table1/camvid/dinov2_vits")
    assert choices
    for row, choice in choices.items():
        cfg = read_config(str(CONFIGS / f"camvid/{row}.yaml"))
        assert choice["rate"] == cfg.SOLVER.BACKBONE_MULTIPLIER, row
