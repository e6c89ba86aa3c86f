"""The commands in the project's documents, for tests/test_commands.py.

Read are the blocks of shell commands, what stands between backticks, and the heads of the configs.
"""

import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (
        *ROOT.glob("*.md"),
        ROOT / "datasets/README.md",
        *(p for folder in ("docs", "examples", "notebooks") for p in (ROOT / folder).rglob("*.md")),
    )
)
CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml"))

# What stands for something that a person fills in. Any other word in capitals is taken as it is.
PLACEHOLDERS = {
    **dict.fromkeys(("N", "M", "T"), "1"),
    "FILE": "configs/demo.yaml",
    "HOST:29500": "localhost:29500",
    "KEY": "SEED",
    "VALUE": "1",
    "TABLE": "selection",
    "VFM": "dinov2_vits",
    "ROW": "freeze",
    "NAME": "camvid_day_val",
    "OUTPUT_DIR": "outputs/demo",
    "INPUT": "picture.png",
}
PYTHONS = ("python", "python3")
# They change the environment or the shell, or look at the whole checkout or at what long runs left.
NOT_HERE = {
    *("cd", "conda", "cp", "curl", "docker", "export", "git", "grep", "jupyter", "jupytext", "ln"),
    *("mkdir", "pip", "pytest", "ruff", "source", "sudo", "uv", "venv", "wget"),
}
PROGRAMS = {*PYTHONS, *NOT_HERE, "make", "sbatch", "tensorboard", "torchrun"}


@dataclass(frozen=True)
class Command:
    """A command in a document.

    Attributes:
        where: document and line.
        words: of the command line, with placeholders filled in.
        said: the comments beside it.
        pattern: whether it had something to fill in or to choose from. What is optional is taken.
    """

    where: str
    words: tuple[str, ...]
    said: str = ""
    pattern: bool = False


def make_command(line: str, where: str, said: str = "") -> Command | None:
    """Reads one line of a shell; None if there is no command in it."""
    # "[--resume]" and "[KEY VALUE ...]" are optional; a list of a config is not.
    options = re.sub(r"(?<!\S)\[((?:--|[A-Z]{2,}\b)[^\]]*)\](?!\S)", r"\1", line)
    words = shlex.split(options, comments=True)
    while words and re.fullmatch(r"\w+=\S*", words[0]):
        del words[0]
    if not words:
        return None
    filled = []
    for word in words:
        plain = word.split("|")[0] if re.fullmatch(r"[\w.]+(\|[\w.]+)+", word) else word
        if plain == "OUTPUT_DIR" and "--config-file" in words:  # there it is a key
            filled.append(plain)
        elif plain not in ("...", "[...]"):
            filled.append(PLACEHOLDERS.get(plain, plain))
    pattern = filled != words
    program = Path(filled[0]).name  # .venv/bin/python is python
    return Command(where, (program, *filled[1:]), said, pattern)


def commands_of_block(body: str, where: Callable[[int], str]) -> Iterator[Command]:
    """The commands of a block: comments and loops understood, lines that go on joined."""
    loop: tuple[str, list[str], list[tuple[int, str]]] | None = None
    said, begun, first = "", "", 0
    for last, line in enumerate(body.splitlines()):
        number = first if begun else last
        begun += line.strip()
        if begun.endswith("\\"):
            begun, first = begun[:-1], number
            continue
        text, begun = begun, ""
        if not text:
            said = ""
        elif text.startswith("#"):
            said += text
        elif match := re.fullmatch(r"for (\w+) in (.+); do", text):
            loop = (match[1], match[2].split(), [])
        elif text == "done" and loop:
            name, values, inside = loop
            loop = None
            for value in values:
                for place, each in inside:
                    each = re.sub(rf"\${name}\b|\${{{name}}}", value, each)
                    yield from _one(each, where(place), said)
        elif loop:
            loop[2].append((number, text))
        else:
            yield from _one(text, where(number), said)


def _one(text: str, where: str, said: str) -> Iterator[Command]:
    beside = re.search(r"\s#\s.*", text)
    command = make_command(text, where, said + (beside[0] if beside else ""))
    if command:
        yield command


def commands_in_blocks(path: Path) -> list[Command]:
    """Those of a document that stand in a block, in its order."""
    text, found = (ROOT / path).read_text(), []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL):
        # Trees of folders have no language either, and no program in them.
        programs = {Path(line.split(" ")[0]).name for line in match[2].splitlines()} & PROGRAMS
        if match[1] in ("sh", "bash") or (not match[1] and programs):
            first = text.count("\n", 0, match.start(2)) + 1
            found += commands_of_block(match[2], lambda n, first=first: f"{path}:{first + n}")
    return found


def commands_in_text(path: Path) -> list[Command]:
    """Those of a document that stand between backticks."""
    text = (ROOT / path).read_text()
    # Without its blocks, but for their lines.
    text = re.sub(r"^```.*?^```", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
    found = []
    for match in re.finditer(r"`([^`]+)`", text):
        words = match[1].split()
        if words[0] in PROGRAMS and len(words) > 1:
            where = f"{path}:{text.count(chr(10), 0, match.start()) + 1}"
            found.append(make_command(" ".join(words), where))
    return found


def commands_of_head(path: Path) -> list[Command]:
    """Those in the indented lines of a config's head."""
    lines = (ROOT / path).read_text().splitlines()
    indented = [line[1:].strip() if line.startswith("#   ") else "" for line in lines]
    body = "\n".join(re.sub(r" \(or: .*\)", "", line) for line in indented)
    found = commands_of_block(body, lambda number: f"{path}:{number + 1}")
    return [command for command in found if command.words[0] in PROGRAMS]


def saved_files(path: Path) -> dict[str, str]:
    """The Python files that a document asks to save: examples that open with a file's name."""
    examples = re.findall(
        r"^```python\n(# (\S+\.py)\n.*?)^```", (ROOT / path).read_text(), re.M | re.S
    )
    return {name: text for text, name in examples}


WRITTEN = {name for path in DOCUMENTS for name in saved_files(path)}
IN_BLOCKS = {path: commands_in_blocks(path) for path in DOCUMENTS}
IN_TEXT = [command for path in DOCUMENTS for command in commands_in_text(path)]
IN_HEADS = [command for path in CONFIGS for command in commands_of_head(path)]
