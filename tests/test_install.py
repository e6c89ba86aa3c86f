"""INSTALL.md: our messages are those of the source, its commands and configs exist."""

import ast
import importlib.util
import re
import runpy
from pathlib import Path

import fishertune_d2
from fishertune_d2 import doctor

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "INSTALL.md").read_text()


def _texts() -> list[str]:
    """Every string of the source, with a line break where a value is put in."""
    texts = [(ROOT / "tools/setup_venv.sh").read_text()]
    for path in (ROOT / "fishertune_d2").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(value, "value", None) for value in node.values]
                texts.append("".join(p if isinstance(p, str) else "\n" for p in parts))
    return texts


def _occurs(message: str, text: str) -> bool:
    """Whether the parts between "..." stand in a text, in this order."""
    end = 0
    for part in message.split("..."):
        start = text.find(part, end)
        if start < 0:
            return False
        end = start + len(part)
    return True


def _our_messages(text: str) -> list[str]:
    """What the first column of the tables quotes, but for the messages of other projects.

    Those have the project's name behind them, as in "`CUDA out of memory` (torch)".
    """
    cells = re.findall(r"^\| ((?:`[^`]*`[;,]? ?)+)(\(a warning\) )?\|", text, flags=re.MULTILINE)
    return [message for quoted, _ in cells for message in re.findall(r"`([^`]*)`", quoted)]


def test_every_message_of_ours_is_in_the_source():
    errors = TEXT.partition("## Errors by their text")[2]
    ours, texts = _our_messages(errors), _texts()
    assert len(ours) > 80
    for message in ours:
        assert len(re.findall("[A-Za-z]", message)) > 6, f"{message} says too little to be found"
        assert any(_occurs(message, text) for text in texts), f"{message} is in no file"


def test_a_message_that_is_not_in_the_source_is_found():
    table = (
        "| message | cause | remedy |\n|---|---|---|\n"
        "| `the checkpoint in ... is of no other run` | c | r |\n"
        "| `... is no key`; `is of another run: ... the checkpoint in` (a warning) | c | r |\n"
        "| `CUDA out of memory` (torch) | c | `r` |\n"
    )
    texts = _texts()
    missing = [m for m in _our_messages(table) if not any(_occurs(m, text) for text in texts)]
    assert missing == [
        "the checkpoint in ... is of no other run",
        "is of another run: ... the checkpoint in",  # in another order
    ]


def test_modules_and_configs_exist():
    modules = re.findall(r"python -m (fishertune_d2[.\w]*)", TEXT)
    assert {"fishertune_d2.doctor", "fishertune_d2.train"} <= {*modules}
    for module in modules:
        assert importlib.util.find_spec(module), module
    configs = re.findall(r"--config-file (\S+\.yaml)", TEXT)
    configs += re.findall(r'get_config_file\("(.*?)"\)', TEXT)
    assert len(configs) == 3
    for config in configs:
        fishertune_d2.get_config_file(config)


def test_the_table_of_drivers_is_the_doctors():
    rows = re.findall(r"^\| (\d+) or newer \| (\d+) \| (.*?) \|$", TEXT, flags=re.MULTILINE)
    assert {int(cuda): int(driver) for driver, cuda, _ in rows} == doctor.OLDEST_DRIVERS
    for _, cuda, torch in rows[1:]:
        assert f"/cu{cuda}" in torch


def test_detectron2_is_installed_as_the_tool_does():
    tool = (ROOT / "tools/install_detectron2.py").read_text()
    (command,) = re.findall(r"^(pip install --no-deps .*?)\n```", TEXT, flags=re.DOTALL | re.M)
    assert command.endswith(runpy.run_path(str(ROOT / "tools/install_detectron2.py"))["WHEEL"])
    for option in re.findall(r"--[a-z-]+", command):
        assert f'"{option}' in tool, option
    assert re.findall(r"fishertune_d2-(.*?)-py3", TEXT) == re.findall(
        r'^version = "(.*?)"', (ROOT / "pyproject.toml").read_text(), flags=re.M
    )
