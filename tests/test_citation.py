"""CITATION.cff, as far as its schema (1.2.0) and the package itself can tell."""

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text())
PAPER = CITATION["preferred-citation"]


def test_it_has_the_fields_that_the_schema_requires():
    assert CITATION["cff-version"] == "1.2.0"
    assert CITATION["type"] == "software"
    assert {"message", "title", "authors"} <= CITATION.keys()
    assert {"type", "title", "authors"} <= PAPER.keys()
    assert "name" in PAPER["conference"]
    assert type(PAPER["year"]) is int and PAPER["month"] in range(1, 13)


@pytest.mark.parametrize("author", CITATION["authors"] + PAPER["authors"])
def test_an_author_is_an_entity_or_a_person(author):
    assert author.keys() in ({"name"}, {"family-names", "given-names"})
    assert all(isinstance(part, str) and part for part in author.values())


def test_it_cites_this_version_of_this_software():
    metadata = (ROOT / "pyproject.toml").read_text()
    for key in ("version", "license"):
        assert CITATION[key] == re.search(rf'^{key} = "(.+?)"', metadata, re.M)[1]


def test_it_cites_the_paper_that_the_readme_names():
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert PAPER["title"] in readme and PAPER["url"] in readme
    (preprint,) = PAPER["identifiers"]
    assert PAPER["url"].endswith(preprint["value"].removeprefix("arXiv:"))
    assert len(PAPER["authors"]) == 7


def test_the_changelog_dates_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"\n## {CITATION['version']} - {CITATION['date-released']}\n" in text
