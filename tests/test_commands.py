"""Every command in the documents can be typed as it stands; it runs, or a comment says why not.

* Every command, also in a sentence or in the head of a config, parses: its program and config
  exist, the program knows the options, the config knows the keys.
* The commands in blocks run in the order of the document, in a copy of the checkout with tiny data.
  Options shorten trainings and plans, and the bench prints its plan only. Some commands do not run:
  those whose comment says that they need something (a GPU, data), trainings on data that are not
  built in, benchmarks whose comment says how many minutes they take, commands that install
  something, and patterns such as ``--seeds N ...``.
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
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import cv2
import pytest
import torch
from detectron2.utils.logger import setup_logger
from documents import (
    IN_BLOCKS,
    IN_HEADS,
    IN_TEXT,
    NOT_HERE,
    PROGRAMS,
    PYTHONS,
    ROOT,
    WRITTEN,
    Command,
    commands_of_block,
    make_command,
    saved_files,
)
from torch.distributed.run import get_args_parser
from tqdm import tqdm

from fishertune_d2.bench import __main__ as bench
from fishertune_d2.bench.tables import entry_names
from fishertune_d2.config import find_config, read_config

PARSE = argparse.ArgumentParser.parse_args


class _Parsed(Exception):
    """Stops a program once it has read its command line."""


def parse(words: Sequence[str]) -> None:
    """Reads the command line and its config; raises a ValueError that says what is wrong."""
    program, *rest = words
    if program == "torchrun":
        parsed = _read(get_args_parser(), rest)
        parse(["python", parsed.training_script, *parsed.training_script_args])
    elif program == "sbatch":
        script = next((word for word in rest if word.endswith(".sbatch")), None)
        if script is None:
            raise ValueError(f"no script in: {' '.join(words)}")
        _require(script)
        runs = {"tools/bench.sbatch": ["-m", "fishertune_d2.bench"]}.get(script, ["train_net.py"])
        parse(["python", *runs, *rest[rest.index(script) + 1 :]])
    elif program == "make":
        for target in (word for word in rest if "=" not in word):
            if not re.search(rf"^{target}:", Path("Makefile").read_text(), re.MULTILINE):
                raise ValueError(f"the Makefile has no target {target}")
    elif program in PYTHONS and rest[0] == "-c":
        compile(rest[1], "-c", "exec")
    elif program in PYTHONS and rest[0] == "-m":
        _parse_module(rest[1], rest[2:])
    elif program in PYTHONS:
        script = "train_net.py" if rest[0] in WRITTEN else rest[0]
        _require(script)
        if script == "tools/fake_cuda":  # it runs the command in the other words
            with patch.object(sys, "path", ["tools", *sys.path]):
                return parse(["python", *rest[1:]])
        _parse_program(script, "".join(_sources(Path(script))), rest[1:])
    elif program not in PROGRAMS:
        raise ValueError(f"no rule for the program {program!r}: add one to tests/test_commands.py")


def _sources(script: Path) -> Iterator[str]:
    """The text of a script, or of the files of a folder that runs as one.

    If a script only imports `run` from a module of the package, the module's text follows.
    """
    if script.is_dir():
        yield from (file.read_text() for file in script.glob("*.py"))
        return
    yield script.read_text()
    imported = re.search(
        r"^from (fishertune_d2[.\w]*) import run$", script.read_text(), re.MULTILINE
    )
    if imported:
        yield Path(find_spec(imported[1]).origin).read_text()


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
        # A sentence that mentions "export delta" leaves out the rest.
        if "required" in str(error):
            return
        raise
    config = getattr(parsed, "config_file", None)
    if config and not str(config).startswith("outputs/"):  # an earlier run writes those
        try:
            config = find_config(str(config))
        except FileNotFoundError:
            raise ValueError(f"no file {config}") from None
        try:
            read_config(config, getattr(parsed, "opts", None) or [])
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
    except SystemExit as error:
        if not error.code:
            return argparse.Namespace()  # --help
        raise ValueError(said.getvalue().strip().splitlines()[-1]) from None


def start(program: str, arguments: Sequence[str]) -> None:
    """Runs a script, or a module of the package, in this process, as ``python`` would."""
    if program == "-c":
        exec(compile(arguments[0], "-c", "exec"), {})
        return
    is_script = program.endswith(".py") or Path(program).is_dir()
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
    """The words to run for a command; None for a command that does not run.

    Args:
        command: A command of a block.
        tiny: Keys and values that make a training or a plan short.

    Raises:
        ValueError: If the command takes long and its comment does not say so.
    """
    words = list(command.words)
    if command.pattern or words[0] in (*NOT_HERE, "sbatch"):
        return None
    if "fishertune_d2.bench" in words:
        told = "needs " in command.said or _tells_time(command)
        if not told and "--report" not in words:
            raise ValueError("say in a comment what data it needs, or how long it takes")
        # A report needs neither data nor time, but it would write into docs/.
        return [*(word for word in words[2:] if word != "--report"), "--dry-run"]
    if "needs " in command.said:
        return None
    if words[0] == "make":
        return ["make", "-n", *words[1:]]
    if words[0] == "torchrun":  # for several see tests/test_several_processes.py
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
    if program == "fishertune_d2.plan":
        return [program, *arguments, *tiny]
    if program == "fishertune_d2.export" and arguments[1].endswith(".safetensors"):
        return [program, *arguments, "--base", "public.safetensors"]  # not from the network
    if program.startswith("train_") or program == "fishertune_d2.train":
        if _needs_data(arguments):
            return None
        weights = ("MODEL.VFM.WEIGHTS", "public.safetensors")
        classes = () if program in WRITTEN else ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "19")
        return [program, *arguments, *tiny, *weights, *classes]
    return [program, *arguments]


def _needs_data(words: Sequence[str]) -> bool:
    """Whether the command's config trains on data that are not built in."""
    names = [word for word in words if word.endswith(".yaml")]
    configs = [str(ROOT / name) if (ROOT / name).is_file() else name for name in names]
    trained = [name for path in configs for name in read_config(path).DATASETS.TRAIN]
    return not all(name.startswith("streets_") for name in trained)


def recipe(command: Command) -> list[Command]:
    """The trainings that a target of the Makefile starts."""
    if command.words[0] != "make":
        return []
    rules = (ROOT / "Makefile").read_text()
    found = [
        re.search(rf"^{target}:.*\n((?:\t.*\n)*)", rules, re.M)
        for target in command.words[1:]
        if "=" not in target
    ]
    lines = [make_command(line, command.where) for rule in found for line in rule[1].splitlines()]
    return [line for line in lines if line.words[1].startswith("train_")]


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


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        ("python train_net.py --config-file configs/dmo.yaml", "no file configs/dmo.yaml"),
        ("python train_net.py --config-file FILE TUNING.METOD full", "is no key"),
        (
            "torchrun --nproc-per-node N train_net.py --config-file FILE SEED x",
            "takes a whole number",
        ),
        ("torchrun --processes N train_net.py", "unrecognized arguments|ambiguous|invalid"),
        ("python -m fishertune_d2.bench table9", "invalid choice: 'table9'"),
        ("python -m fishertune_d2.export plain OUTPUT_DIR --layuot timm", "unrecognized"),
        ("python -m fishertune_d2.plans --config-file FILE", "no module fishertune_d2.plans"),
        ("python tools/zoo.py", "no file tools/zoo.py"),
        ("sbatch tools/train.sh --config-file FILE", "no script"),
        ("make dmo", "no target dmo"),
        ("pythn train_net.py", "no rule for the program 'pythn'"),
    ],
)
def test_a_slip_is_found(line, wrong, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match=wrong):
        parse(make_command(line, "here").words)


def test_shortened_chooses_the_commands_that_run(tiny_run):
    body = """
python benchmarks/scaling.py --show docs/results/scaling.json
for method in full freeze; do
  python train_net.py --config-file configs/demo.yaml \\
    TUNING.METHOD $method
done
python -m fishertune_d2.plan --config-file FILE [--memory-gb N]
python train_net.py --config-file configs/full_dinov2.yaml
sbatch --array 42-44 tools/bench.sbatch table1 --profile paper

# needs CamVid
python train_net.py --config-file configs/camvid/full.yaml    # minutes

python benchmarks/scaling.py"""
    *found, last = commands_of_block(body, str)
    assert [command.where for command in found] == ["1", "3", "3", "6", "7", "8", "11"]
    shown, full, freeze, *not_run = (shortened(command, tiny_run) for command in found)
    assert shown == ["benchmarks/scaling.py", "--show", "docs/results/scaling.json"]
    assert full[3:5] == ["TUNING.METHOD", "full"] and freeze[3:5] == ["TUNING.METHOD", "freeze"]
    assert not_run == [None] * 4
    with pytest.raises(ValueError, match="how many minutes"):
        shortened(last, tiny_run)


@pytest.mark.parametrize("path", sorted({c.where.split(":")[0] for c in IN_HEADS}))
def test_a_config_with_a_command_says_what_it_needs(path):
    assert re.search(r"^# Needs[:,] \w", (ROOT / path).read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", [path for path, found in IN_BLOCKS.items() if found], ids=str)
def test_it_runs_or_says_what_it_needs(path, furnished, tiny_run):
    commands = []
    for command in [each for found in IN_BLOCKS[path] for each in (found, *recipe(found))]:
        try:
            words = shortened(command, tiny_run)
        except ValueError as error:
            pytest.fail(f"{command.where}: {error}")
        if words:
            commands.append((command.where, words))
    shutil.copytree(ROOT / "docs/results/fisher", furnished / "outputs/fisher")
    for name, text in saved_files(path).items():
        (furnished / name).write_text(text)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fishertune_d2.engine"])
    child = context.Process(target=_run_all, args=(furnished, commands))
    child.start()
    child.join()
    assert child.exitcode == 0, (furnished / "said.txt").read_text()[-4000:]
    # Tables of a folder's files: "| in `outputs/demo/` | |", then a line for each file.
    tables = re.findall(r"^\| in `(.+?)/`.*\n\|.*\n((?:\|.*\n)+)", (ROOT / path).read_text(), re.M)
    for folder, lines in tables:
        for name in re.findall(r"`([a-z_]+(?:\.\w+|/))`", lines):
            assert (furnished / folder / name).exists(), f"{path}: there is no {name} in {folder}"


def _run_all(checkout: Path, commands: Sequence[tuple[str, list[str]]]) -> None:
    """Runs commands in turn; exits with 1 at the first that fails."""
    os.chdir(checkout)
    os.environ |= {"DETECTRON2_DATASETS": "datasets", "FISHERTUNE_CACHE": str(checkout / "cache")}
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    tqdm.set_lock(threading.RLock())  # tqdm's own stays locked if a process is killed
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
    """Removes the log handlers, so that the next command sets up logging as in a new process."""
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
        if place.parent.suffix != ".jsonl":  # a table of runs has its own rates
            place.mkdir(parents=True, exist_ok=True)
            choices = {name: {"rate": 1.0} for name in entry_names()}
            (place / "choices.json").write_text(json.dumps(choices))  # as after a search
    delta = Path("outputs/demo/delta.safetensors")
    if delta.exists():  # the recipient of a delta has it in the working folder
        shutil.copy(delta, delta.name)
    start(program, arguments)
