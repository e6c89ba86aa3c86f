"""docs/architecture.md says which room may import which, and who reads the config."""

import ast
import re
from collections.abc import Iterator
from functools import lru_cache
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fishertune_d2"
PAGE = (ROOT / "docs/architecture.md").read_text()
GROUND = re.search(r'ground\["ground: (.*)"\]', PAGE)[1].split(", ")
ARROWS = re.findall(r"^ +(\w+) --> (\w+)$", PAGE, re.MULTILINE)
ROOMS = {room for arrow in ARROWS for room in arrow}
MODULES = sorted(PACKAGE.rglob("*.py"))
# Functions that take the config whole: builders that choose by a key, and those of these rooms.
CONFIG_ROOMS = ("engine", "bench", "plan", "predict", "export", "commands", "ground")
CONFIG_BUILDERS = ("build_head", "build_tuning_method", "token_options")


def room_of(module: str) -> str:
    """The room of a module of the package, by its dotted name."""
    name = (module.split(".") + [""])[1]
    if name in GROUND:
        return "ground"
    return name if name in ROOMS else "commands"


def imports(file: Path) -> Iterator[str]:
    """Dotted names of the package's modules that a file imports, also inside functions."""
    package = ["fishertune_d2", *file.relative_to(PACKAGE).parent.parts]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parts = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*parts, *([node.module] if node.module else [])])
            if base == "fishertune_d2":
                yield from (f"{base}.{alias.name}" for alias in node.names)
            else:
                yield base


def reachable() -> set[tuple[str, str]]:
    """Pairs of rooms of which the first may import the second."""
    below = {room: {room} for room in ROOMS}
    graph = {room: {low for high, low in ARROWS if high == room} for room in ROOMS}
    for room in TopologicalSorter(graph).static_order():  # raises where arrows form a circle
        below[room] |= {deep for low in graph[room] for deep in below[low]}
    return {(room, low) for room in ROOMS for low in below[room]}


@lru_cache
def found_imports() -> dict[tuple[str, str], list[str]]:
    """Files that import another room, by both rooms."""
    found: dict[tuple[str, str], list[str]] = {}
    for file in MODULES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for target in imports(file):
            if target.split(".")[0] == "fishertune_d2" and room_of(name) != room_of(target):
                place = str(file.relative_to(ROOT))
                found.setdefault((room_of(name), room_of(target)), []).append(place)
    return found


def test_every_folder_of_the_package_is_a_room_of_the_diagram():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert folders == ROOMS - {"commands", "ground", "run"}


def test_rooms_import_along_the_arrows_only():
    allowed = reachable()
    wrong = {pair: files for pair, files in found_imports().items() if pair not in allowed}
    assert not wrong


def test_every_arrow_stands_for_an_import():
    drawn = {arrow for arrow in ARROWS if arrow[0] != "commands"}  # rooms have their own commands
    assert drawn <= found_imports().keys()


def test_only_those_that_the_page_names_read_the_config():
    readers = []
    for file in MODULES:
        room = room_of(".".join(file.relative_to(ROOT).with_suffix("").parts))
        if room in CONFIG_ROOMS:
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and reads_config(node):
                registered = any("TUNING_REGISTRY" in ast.dump(d) for d in node.decorator_list)
                if not (registered or node.name in ("from_config", *CONFIG_BUILDERS)):
                    readers.append(f"{file.relative_to(ROOT)}: {node.name}")
    assert not readers


def reads_config(function: ast.FunctionDef) -> bool:
    """Whether a function asks ``cfg`` for a key."""
    return any(
        isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "cfg"
        and node.attr.isupper()
        for node in ast.walk(function)
    )


def test_files_and_functions_are_short():
    long = []
    for file in MODULES:
        text, place = file.read_text(), str(file.relative_to(ROOT))
        if len(text.splitlines()) > 400:
            long.append(f"{place}: {len(text.splitlines())} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 60:
                long.append(f"{place}: {node.name}, {node.end_lineno - node.lineno + 1} lines")
    assert not long
