"""Links between the project's documents."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("configs", "datasets", "docs", "examples", "notebooks")
DOCUMENTS = [*ROOT.glob("*.md"), *(p for name in FOLDERS for p in (ROOT / name).rglob("*.md"))]


@pytest.mark.parametrize("document", sorted(DOCUMENTS), ids=lambda p: str(p.relative_to(ROOT)))
def test_what_is_linked_or_shown_is_there(document):
    targets = re.findall(r"\]\(([^)\s]+)\)", document.read_text())
    ours = [target.partition("#")[0] for target in targets if "://" not in target]
    assert [target for target in ours if not (document.parent / target).exists()] == []
