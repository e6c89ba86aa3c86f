import json
import os
import sys
from contextlib import suppress
from pathlib import Path

import pytest
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from fvcore.common.registry import Registry
from torch.multiprocessing import ProcessExitedException, start_processes
from yaml import safe_load

from fishertune_d2.command_line import TRACEBACK, can_be_mended, ending_in_a_sentence, sentence
from fishertune_d2.data import DatasetError


def _raise(error: Exception):
    raise error


MENDABLE = {
    "data": (lambda: _raise(DatasetError("a.png: too small\n\nb.png: gone")), "a.png: too small"),
    "a value": (lambda: _raise(ValueError("SEED is -1: choose another")), "SEED is -1"),
    "a file": (lambda: open("/no/such.yaml"), "No such file or directory: '/no/such.yaml'"),
    "a loss": (lambda: _raise(FloatingPointError("loss is nan")), "loss is nan"),
    "a name": (lambda: Registry("TUNING").get("magic"), "No object named 'magic'"),
    "a data set": (lambda: DatasetCatalog.get("magic"), "Dataset 'magic' is not registered"),
    "a key": (lambda: get_cfg().merge_from_list(["MAGIC", 1]), "Non-existent key: MAGIC"),
    "a tab": (lambda: safe_load("a:\n\t- b"), "cannot start any token"),
    "a package": (lambda: _raise(ImportError("FisherTune needs Detectron2")), "needs Detectron2"),
}


@pytest.mark.parametrize("name", MENDABLE)
def test_what_a_user_can_mend_ends_in_a_sentence(name, capsys):
    fail, words = MENDABLE[name]
    with pytest.raises(SystemExit) as left, ending_in_a_sentence():
        fail()
    said = capsys.readouterr().err
    assert left.value.code == 1 and said.startswith("error: ") and words in said
    assert "Traceback" not in said and not said.startswith(("error: '", 'error: "'))


def test_all_paragraphs_are_said(capsys):
    with pytest.raises(SystemExit) as left, ending_in_a_sentence(code=2):
        raise DatasetError("a.png: too small\n\nb.png: gone")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: a.png: too small\n\nb.png: gone\n"


@pytest.mark.parametrize(
    "fail",
    [
        lambda: {}["a"],
        lambda: _raise(AssertionError("of our own")),
        lambda: _raise(RuntimeError("of torch")),
        lambda: [].pop(),
        lambda: __import__("no_such_module_of_anybody"),
    ],
)
def test_an_error_of_the_program_keeps_its_traceback(fail):
    try:
        fail()
    except Exception as error:
        expected = type(error)
        assert not can_be_mended(error)
    with pytest.raises(expected), ending_in_a_sentence():
        fail()


def test_a_value_error_of_another_library_says_where(monkeypatch, capsys):
    def fail() -> None:
        with suppress(SystemExit), ending_in_a_sentence():
            json.loads("{")

    fail()
    said = capsys.readouterr().err
    assert "json.decoder, line " in said and f"{TRACEBACK}=1" in said and "Traceback" not in said
    monkeypatch.setenv(TRACEBACK, "1")
    fail()
    assert "Traceback" in capsys.readouterr().err


def test_an_error_without_words_has_a_name():
    assert sentence(ValueError()) == "ValueError"
    assert sentence(KeyError("no method 'a'; there are b")) == "no method 'a'; there are b"


def _fail_in_a_child(rank: int, said: Path) -> None:
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), sys.stderr.fileno())
    with ending_in_a_sentence():
        raise ValueError("of a child")


def test_a_child_process_leaves_with_the_code(tmp_path):
    said = tmp_path / "stderr.txt"
    with pytest.raises(ProcessExitedException) as left:
        start_processes(_fail_in_a_child, (said,), nprocs=1, start_method="forkserver")
    assert left.value.exit_code == 1
    text = said.read_text()
    assert text.startswith("error: of a child") and "Traceback" not in text
