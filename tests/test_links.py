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


@pytest.mark.parametrize("document", sorted(DOCUMENTS), ids=lambda p: str(p.relative_to(ROOT)))
def test_headings_that_are_linked_are_there(document):
    lost = []
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        file, _, heading = target.partition("#")
        path = document.parent / file if file else document
        if heading and "://" not in target and heading not in _anchors(path):
            lost.append(target)
    assert lost == []


def _anchors(document: Path) -> list[str]:
    """The anchors that GitHub gives a document's headings."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    kept = (re.sub(r"[^\w -]", "", heading).strip().lower() for heading in headings)
    return [heading.replace(" ", "-") for heading in kept]
