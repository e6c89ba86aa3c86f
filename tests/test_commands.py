"""Every command in the documents: it can be typed as it stands, and it is run, or says why not.

* Every command, also one in the middle of a sentence or in a config's head, must parse: its program
  and its config exist, it has the options, the config has the keys.
* A command in a block of its own is run, in the order of the document, in a copy of the checkout
  with tiny data: a training is shortened by options, the bench is asked what it would do. Not run
  is what a comment beside it says "needs" something for (a GPU, data), a benchmark whose comment
  says how many minutes it takes, what installs things, and a pattern such as ``--seeds N ...``.
"""

import argparse
import json
import logging
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import pytest
import timm
import torch
from detectron2.utils.logger import setup_logger
from PIL import Image
from safetensors.torch import save_file
from torch.distributed.run import get_args_parser
from tqdm import tqdm

from fishertune_d2.bench import __main__ as bench
from fishertune_d2.bench.tables import rows_of_registry
from fishertune_d2.config import read_config
from fishertune_d2.data.streets.dataset import DOMAINS, GENERATOR_VERSION, VERSION_FILE

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
PYTHONS = ("python", "python3", ".venv/bin/python")
# They change the environment or the shell, or look at the whole checkout.
NOT_HERE = {"cd", "conda", "docker", "export", "git", "pip", "pytest", "ruff", "source", "uv"}
PROGRAMS = {*PYTHONS, *NOT_HERE, "make", "sbatch", "tensorboard", "torchrun"}


@dataclass(frozen=True)
class Command:
    """A command in a document.

    Attributes:
        where: document and line.
        words: of the command line, with placeholders filled in.
        said: the comments beside it.
        pattern: whether it had something to fill in or to choose from.
    """

    where: str
    words: tuple[str, ...]
    said: str = ""
    pattern: bool = False

    @property
    def program(self) -> str:
        """Its first word."""
        return self.words[0]


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
    return Command(where, tuple(filled), said, options != line or filled != words)


def commands_of_block(body: str, where: Callable[[int], str]) -> Iterator[Command]:
    """The commands of a block: comments and loops understood, lines that go on joined."""
    loop: tuple[str, list[str], list[tuple[int, str]]] | None = None
    lines, said, begun = body.splitlines(), "", ""
    for number, line in enumerate(lines):
        begun += line.strip()
        if begun.endswith("\\"):
            begun = begun[:-1]
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


def blocks(document: str) -> Iterator[tuple[int, str, str]]:
    """Line, language and text of each block of a document that may hold commands."""
    for match in re.finditer(r"^```(\w*)\n(.*?)^```", document, flags=re.MULTILINE | re.DOTALL):
        first = document.count("\n", 0, match.start(2)) + 1
        programs = {line.split(" ")[0] for line in match[2].splitlines()}
        # Trees of folders have no language, and no program in them.
        if match[1] in ("sh", "bash") or (not match[1] and programs & PROGRAMS):
            yield first, match[1], match[2]


def commands_in_blocks(path: Path) -> list[Command]:
    """Those of a document, in its order."""
    found = []
    for first, _, body in blocks((ROOT / path).read_text()):
        found += commands_of_block(body, lambda n, first=first: f"{path}:{first + n}")
    return found


def commands_in_text(path: Path) -> list[Command]:
    """Those between backticks."""
    text = re.sub(
        r"^```.*?^```",
        lambda m: "\n" * m[0].count("\n"),
        (ROOT / path).read_text(),
        flags=re.M | re.S,
    )
    found = []
    for match in re.finditer(r"`([^`]+)`", text):
        line = match[1].replace("\n", " ").replace(r"\|", "|")
        if line.split(" ")[0] in PROGRAMS and " " in line and "=" not in line.split(" ")[0]:
            command = make_command(line, f"{path}:{text.count(chr(10), 0, match.start()) + 1}")
            found += [command] if command else []
    return found


def commands_of_head(path: Path) -> list[Command]:
    """Those in a config's head."""
    head = [line for line in (ROOT / path).read_text().splitlines() if line.startswith("#")]
    found, begun = [], ""
    for number, line in enumerate(head, 1):
        text = re.sub(r"\(or: (.*)\)", "", line.removeprefix("#").strip())
        if begun or text.split(" ")[0] in PROGRAMS:
            begun += text
            if begun.endswith("\\"):
                begun = begun[:-1]
                continue
            command = make_command(begun, f"{path}:{number}")
            found, begun = [*found, *([command] if command else [])], ""
    return found


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


PARSE = argparse.ArgumentParser.parse_args


class _Parsed(Exception):
    """Stops a program after its command line was read."""


def parse(words: Sequence[str]) -> None:
    """Lets a program read its command line, and reads its config with the keys; runs nothing.

    Args:
        words: of the command, in the root of the checkout.

    Raises:
        ValueError: says what is wrong.
    """
    program, *rest = words
    if program == "torchrun":
        parsed = _read(get_args_parser(), rest)
        parse(["python", parsed.training_script, *parsed.training_script_args])
    elif program == "sbatch":
        (script,) = [word for word in rest if word.endswith(".sbatch")]
        _require(script)
        parse(["python", "train_net.py", *rest[rest.index(script) + 1 :]])
    elif program == "make":
        for target in rest:
            if not re.search(rf"^{target}:", Path("Makefile").read_text(), re.MULTILINE):
                raise ValueError(f"the Makefile has no target {target}")
    elif program in PYTHONS and rest[0] == "-m":
        _parse_module(rest[1], rest[2:])
    elif program in PYTHONS:
        script = "train_net.py" if rest[0] in WRITTEN else rest[0]
        _require(script)
        _parse_program(script, Path(script).read_text(), rest[1:])
    elif program not in PROGRAMS:
        raise ValueError(f"no rule for the program {program!r}: add one to tests/test_commands.py")


def _parse_module(name: str, arguments: Sequence[str]) -> None:
    found = find_spec(name)
    if found is None:
        raise ValueError(f"no module {name}")
    if name in NOT_HERE:
        for path in (word for word in arguments if "/" in word):
            _require(path)
    elif name.startswith("fishertune_d2"):
        folders = found.submodule_search_locations or ()
        files = [file for folder in folders for file in Path(folder).glob("*.py")]
        text = "".join(file.read_text() for file in files or [Path(found.origin)])
        _parse_program(name, text, arguments)


def _parse_program(program: str, text: str, arguments: Sequence[str]) -> None:
    if "rgparse" not in text and "argument_parser" not in text:
        return  # it takes no options
    try:
        parsed = _stop_when_read(program, arguments)
    except ValueError as error:
        # A mention of "export delta" in a sentence leaves the rest out.
        if "required" in str(error):
            return
        raise
    config = getattr(parsed, "config_file", None)
    if config:
        _require(config)
        try:
            read_config(str(config), getattr(parsed, "opts", None) or [])
        except (AssertionError, KeyError, ValueError) as error:
            raise ValueError(f"{config}: {error}") from error


def _stop_when_read(program: str, arguments: Sequence[str]) -> argparse.Namespace:
    def read(parser, given=None, namespace=None):
        raise _Parsed(_read(parser, sys.argv[1:] if given is None else given))

    try:
        with patch.object(argparse.ArgumentParser, "parse_args", read):
            start(program, arguments)
    except _Parsed as parsed:
        return parsed.args[0]
    raise ValueError(f"{program} read no command line")


def _read(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    said = StringIO()
    try:
        with redirect_stderr(said):
            return PARSE(parser, list(arguments))
    except SystemExit:
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None


def start(program: str, arguments: Sequence[str]) -> None:
    """Runs a script, or a module of the package, in this process, as ``python`` would."""
    is_script = program.endswith(".py")
    folder = str(Path(program).resolve().parent) if is_script else os.getcwd()
    with (
        patch.object(sys, "argv", [program, *arguments]),
        patch.object(sys, "path", [folder, *sys.path]),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module imported before
        (runpy.run_path if is_script else runpy.run_module)(program, run_name="__main__")


def _require(path: str) -> None:
    if not Path(path).exists():
        raise ValueError(f"no file {path}")


def shortened(command: Command, tiny: Sequence[str]) -> list[str] | None:
    """The words to run for a command, None for one that is not run.

    Args:
        command: of a block.
        tiny: keys and values that make a training short.

    Raises:
        ValueError: if it would take long and does not say so.
    """
    words = list(command.words)
    if command.pattern or words[0] in NOT_HERE:
        return None
    if "fishertune_d2.bench" in words:
        if "needs " not in command.said and not _tells_time(command):
            raise ValueError("say in a comment what data it needs, or how long it takes")
        return [*words[2:], "--dry-run"]
    if "needs " in command.said:
        return None
    if words[0] == "make":
        return ["make", "-n", *words[1:]]
    if words[0] == "torchrun":  # several processes are tests/test_train_net.py's
        parsed = _read(get_args_parser(), words[1:])
        words = ["python", parsed.training_script, *parsed.training_script_args]
    program, *arguments = words[2:] if words[1] == "-m" else words[1:]
    if program in NOT_HERE:
        return None
    if program.startswith("benchmarks/") and not program.endswith("_tables.py"):
        if "--show" not in arguments:
            if not _tells_time(command):
                raise ValueError(f"{program}: say in a comment how many minutes it takes")
            return None
    if program.startswith("train_"):
        weights = ("MODEL.VFM.WEIGHTS", "public.safetensors")
        classes = () if program in WRITTEN else ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19")
        return [program, *arguments, *tiny, *weights, *classes]
    return [program, *arguments]


def _tells_time(command: Command) -> bool:
    return bool(re.search(r"\d (minutes|hours)", command.said))


@pytest.mark.parametrize(
    "command",
    [*(c for found in IN_BLOCKS.values() for c in found), *IN_TEXT, *IN_HEADS],
    ids=lambda command: command.where,
)
def test_it_can_be_typed_as_it_stands(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    try:
        parse(command.words)
    except ValueError as error:
        pytest.fail(f"{command.where}: {' '.join(command.words)}: {error}")


@pytest.mark.parametrize("path", [p for p in DOCUMENTS if IN_BLOCKS[p]], ids=str)
def test_it_runs_or_says_what_it_needs(path, checkout, tiny_run):
    commands = []
    for command in IN_BLOCKS[path]:
        try:
            words = shortened(command, tiny_run)
        except ValueError as error:
            pytest.fail(f"{command.where}: {error}")
        if words:
            commands.append((command.where, words))
    _furnish(checkout, path)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fishertune_d2.engine"])
    child = context.Process(target=_run_all, args=(checkout, commands))
    child.start()
    child.join()
    assert child.exitcode == 0, (checkout / "said.txt").read_text()[-4000:]
    # Tables of what lies in a folder: "| in `outputs/demo/` | |", and a line for each file.
    tables = re.findall(r"^\| in `(.+?)/`.*\n\|.*\n((?:\|.*\n)+)", (ROOT / path).read_text(), re.M)
    for folder, lines in tables:
        for name in re.findall(r"`([a-z_]+(?:\.\w+|/))`", lines):
            assert (checkout / folder / name).exists(), f"{path}: there is no {name} in {folder}"


def _furnish(checkout: Path, document: Path) -> None:
    """Lays down what a person has who follows the document: data, weights, files they saved."""
    rng = np.random.default_rng(0)

    def draw(image: Path, label: Path, classes: int) -> None:
        for path, shape, end in ((image, (48, 96, 3), 256), (label, (48, 96), classes)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, end, shape, dtype=np.uint8)).save(path)

    streets = checkout / "datasets/streets"
    for split, domain in (("train", "day"), *(("val", domain) for domain in DOMAINS)):
        for i in range(2 if split == "train" else 1):
            name = f"{split}/{domain}/{domain}_000000_{i:06d}"
            draw(
                streets / f"leftImg8bit/{name}_leftImg8bit.png",
                streets / f"gtFine/{name}_gtFine_labelTrainIds.png",
                19,
            )
    (streets / VERSION_FILE).write_text(GENERATOR_VERSION)
    for city in ("my_city", "my_city_at_night"):
        for i in range(2):
            draw(checkout / city / f"images/{i}.jpg", checkout / city / f"labels/{i}.png", 3)
    torch.manual_seed(0)
    public = timm.create_model("test_vit", num_classes=0).state_dict()
    save_file(public, checkout / "public.safetensors")
    shutil.copytree(ROOT / "docs/results/fisher", checkout / "outputs/fisher")
    for name, text in saved_files(document).items():
        (checkout / name).write_text(text)


def _run_all(checkout: Path, commands: Sequence[tuple[str, list[str]]]) -> None:
    """Runs commands one after the other; exits with 1 at the first that fails."""
    os.chdir(checkout)
    os.environ |= {"DETECTRON2_DATASETS": "datasets", "FISHERTUNE_CACHE": str(checkout / "cache")}
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    tqdm.set_lock(threading.RLock())  # its own, between processes, outlives one that is killed
    with open("said.txt", "w", buffering=1) as log, redirect_stdout(log), redirect_stderr(log):
        for where, (program, *arguments) in commands:
            print(f"{where}: {program} {shlex.join(arguments)}")
            _forget_logs()
            try:
                _run(program, arguments)
            except (Exception, SystemExit) as error:
                if isinstance(error, SystemExit) and not error.code:
                    continue
                traceback.print_exc()
                sys.exit(1)


def _forget_logs() -> None:
    """Lets the next command set up logging as in a process of its own."""
    setup_logger.cache_clear()
    for name in ("detectron2", "fvcore", "fishertune_d2"):
        logging.getLogger(name).handlers.clear()


def _run(program: str, arguments: Sequence[str]) -> None:
    if program == "make":
        subprocess.run([program, *arguments], check=True, stdout=sys.stdout, stderr=sys.stdout)
        return
    if program == "fishertune_d2.bench":
        args = bench._parser().parse_args(arguments)
        place = (args.output or Path("outputs/bench") / args.profile) / "dinov2_vits"
        place.mkdir(parents=True, exist_ok=True)
        choices = {row: {"rate": 1.0} for row in rows_of_registry()}
        (place / "choices.json").write_text(json.dumps(choices))  # as after a search
    start(program, arguments)
