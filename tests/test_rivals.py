"""docs/rivals.md is the page that its command writes, with a row for every method of Table 1."""

from pathlib import Path
from runpy import run_path

import pytest

from fishertune_d2.bench.tables import TABLES

ROOT = Path(__file__).resolve().parents[1]
TOOL = run_path(str(ROOT / "tools/rivals.py"))


@pytest.fixture(scope="module")
def page() -> str:
    return TOOL["page"]()


def test_the_page_is_what_its_command_writes(page):
    assert (ROOT / "docs/rivals.md").read_text() == page, "run python tools/rivals.py"


def test_every_method_of_table_1_has_a_row():
    assert {*TABLES["table1"].entries} <= {rival.method for rival in TOOL["RIVALS"]}


def test_counts_are_the_published_ones(page):
    """SoMA's 4,866,048 and Rein's 2.99 M are in their papers."""
    counts = {rival.name: rival for rival in TOOL["RIVALS"]}
    assert counts["SoMA"].count() == 4_866_048
    assert "| 2.99 M " in next(line for line in page.splitlines() if line.startswith("| Rein "))


def test_numbers_of_papers_stand_under_their_test_size(page):
    """The same method has one number for each size; Rein has two."""
    parts = page.partition("## What papers report")[2].partition("## What was measured")[0]
    sections = parts.split("### ")[1:]
    means = {s.splitlines()[0]: [r.split("|")[6].strip() for r in s.splitlines() if "| Rein " in r]
             for s in sections}  # fmt: skip
    assert [each for each in means.values() if each] == [["64.3"], ["66.1"]]
    assert all("1024" in title for title in means)
