"""The table of silent faults in tests/README.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parent
TABLE = (TESTS / "README.md").read_text()
NAMED = re.findall(r"`((?:\w+/)?test_\w+\.py)(?:::(\w+))?`", TABLE)


@pytest.mark.parametrize(("file", "function"), NAMED, ids=[f"{f}::{n}" for f, n in NAMED])
def test_a_test_of_the_table_exists(file, function):
    tree = ast.parse((TESTS / file).read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert function in functions if function else functions


def test_every_kind_of_the_table_has_a_test():
    rows = [line.split("|")[1:-1] for line in TABLE.splitlines() if line.startswith("| ")]
    kinds = [row for row in rows if row[0].strip() != "kind" and "**" not in row[0]]
    assert len(kinds) > 30
    assert [kind for kind, _, tests in kinds if "test_" not in tests] == []
