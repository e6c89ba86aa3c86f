"""`fishertune_d2.data.streets`, the old name of the room, still works and says the new one."""

import os
import runpy
import sys

from fishertune_d2 import streets


def test_the_module_has_the_same_members():
    from fishertune_d2.data import streets as old

    assert all(getattr(old, name) is getattr(streets, name) for name in streets.__all__)


def test_the_command_says_its_new_name(tmp_path, monkeypatch, capsys):
    (tmp_path / streets.dataset.VERSION_FILE).write_text(streets.dataset.GENERATOR_VERSION)
    monkeypatch.delitem(sys.modules, "fishertune_d2.data.streets", raising=False)
    monkeypatch.setattr(sys, "argv", ["streets", "--output", os.fspath(tmp_path)])
    runpy.run_module("fishertune_d2.data.streets", run_name="__main__", alter_sys=True)
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "now called fishertune_d2.streets" in told.err
    assert str(tmp_path) in told.out
