"""A study's table, which ``--save`` writes, is read as the folder of its runs."""

import json
from pathlib import Path

import pytest

from fishertune_d2.analysis.study import find_runs, read_table
from fishertune_d2.bench import __main__ as bench
from fishertune_d2.run import RunError

ENTRIES = ("table4", "--methods", "freeze", "full", "fisher")
SEEDS = ("--seeds", "42", "43")


@pytest.fixture(scope="module")
def runs(shared_runs):
    """The bench with a command that trains nothing."""
    return shared_runs


@pytest.fixture(scope="module")
def table(runs):
    """A table with the runs of a search, of two seeds, and of their test."""
    table = runs.folder / "study.jsonl"
    runs.score({"full 1.0": 43.0, "fisher 3.0": 50.0})
    for stage in (["--search"], SEEDS, [*SEEDS, "--test"]):
        assert runs(*ENTRIES, *stage, "--save", str(table)) == 0
    return table


def test_scores_beside_those_of_the_training_are_no_run_of_their_own(table, tmp_path):
    *_, last = table.read_text().splitlines()
    again = json.dumps(json.loads(last) | {"run": "dinov2_vits/freeze_43/table3"})
    both = tmp_path / "both.jsonl"
    both.write_text(table.read_text() + again)
    for test in (False, True):
        names = [Path(path).name for path in find_runs(both, test)]
        assert names == [Path(path).name for path in find_runs(table, test)]


@pytest.mark.parametrize("stage", [["--search"], SEEDS, [*SEEDS, "--test"]])
def test_a_report_of_the_table_is_that_of_the_folder(runs, table, stage, capsys):
    runs.calls(), capsys.readouterr()
    assert runs(*ENTRIES, *stage, "--report") == 0
    of_folder = capsys.readouterr().out
    report = [*ENTRIES, *stage, "--report", "--profile", "camvid"]
    assert bench.main([*report, "--output", str(table)]) == 0
    of_table = capsys.readouterr().out
    assert runs.calls() == []
    if stage == ["--search"]:
        folder, *of_folder = of_folder.splitlines()  # the table has no choices.json
        assert folder == str(runs.cells / "choices.json") and len(of_folder) == 2
        of_table = of_table.splitlines()
    assert of_table == of_folder
    name = "table4_test" if "--test" in stage else "table4"
    written = [(table.parent / "study" / name).with_suffix(end) for end in (".csv", ".md", ".png")]
    assert stage == ["--search"] or all(path.is_file() for path in written)


def test_a_line_is_a_run_with_its_record(runs, table):
    lines = {run.run: run for run in read_table(table)}
    assert len(lines) == 1 + 2 * 3 + 3 + 6  # frozen, two searches, the second seed, the tests
    run = lines["dinov2_vits/full@rate=1_43/test"]
    assert (run.entry, run.vfm, run.seed, run.rate) == ("full", "dinov2_vits", 43, 1.0)
    assert run.train == ("camvid_day_train",) and run.seconds > 0
    # Seeds have configs of their own; a test has the config of its training.
    trained = lines["dinov2_vits/full@rate=1_43"]
    assert run.config == trained.config != lines["dinov2_vits/full@rate=1_42"].config
    results = json.loads((runs.cells / "full@rate=1_43/test/results.json").read_text())
    assert run.content == results


def test_saving_again_replaces_runs(runs, table):
    before = table.read_text()
    assert runs(*ENTRIES, *SEEDS, "--report", "--save", str(table)) == 0
    assert table.read_text() == before


def test_a_table_is_only_reported(table, capsys):
    only = ["selection", "--profile", "camvid", "--methods", "freeze"]
    for arguments, told in (
        (["--output", str(table)], "is a table of runs: add --report, or name a folder"),
        (["--output", str(table), "--report", "--save", str(table)], "--save adds the runs of"),
        (["--save", "study.csv"], "--save study.csv: name a table of runs, FILE.jsonl"),
    ):
        with pytest.raises(SystemExit) as left:
            bench.main([*only, *arguments])
        assert left.value.code == 2 and told in capsys.readouterr().err


@pytest.mark.parametrize("line", ['{"run": "a_1"}', "{", "3"])
def test_a_file_that_is_no_table_is_named(tmp_path, line):
    table = tmp_path / "study.jsonl"
    with pytest.raises(RunError, match=r"no .*study.jsonl: write it with fishertune_d2.bench"):
        read_table(table)
    table.write_text(line + "\n")
    with pytest.raises(RunError, match=r"study.jsonl, line 1, is no run"):
        read_table(table)
