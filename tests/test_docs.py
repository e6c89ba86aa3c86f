"""API pages: `make docs` names modules that exist, and their docstrings render."""

import re
import warnings
from importlib.util import find_spec
from pathlib import Path

import pdoc

ROOT = Path(__file__).resolve().parents[1]


def test_a_room_renders_without_a_warning(tmp_path):
    pdoc.render.configure(docformat="google", math=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # pdoc's: what it could not read
        pdoc.pdoc("fishertune_d2.fisher", output_directory=tmp_path)
    page = (tmp_path / "fishertune_d2/fisher.html").read_text()
    assert "<strong>ValueError:</strong>" in page  # a section that is rendered
    texts = re.findall(r'docstring">(.*?)</div>', page, flags=re.DOTALL)
    assert len(texts) > 50
    for mark in ("Args:", ":func:", ":class:", "``", "<code>~"):  # as it is written, not rendered
        assert not [text for text in texts if mark in text], mark


def test_make_docs_names_modules_that_exist():
    (names,) = re.findall(r"\$\(addprefix fishertune_d2\.,(.*)\)", (ROOT / "Makefile").read_text())
    assert "fisher" in names.split()
    for name in names.split():
        assert find_spec(f"fishertune_d2.{name}"), name
