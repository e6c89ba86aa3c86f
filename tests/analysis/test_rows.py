import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from fishertune_d2.analysis import rows


def _write(folder, name, day, night, tuned=1_500_000, targets=None, **protocol):
    row, _, seed = name.rpartition("_")
    results = {
        "source": {"day": day},
        "targets": {"night": night} if targets is None else targets,
        "protocol": {"method": row, "commit": "abc", "seed": int(seed), "steps": 9, **protocol},
        "tuned_parameters": tuned,
        "backbone_parameters": 30_000_000,
    }
    (folder / name).mkdir(parents=True)
    (folder / name / "results.json").write_text(json.dumps(results))


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    _write(folder, "fishertune_9", 60.0, 40.0)
    _write(folder, "fishertune_10", 62.0, 44.0, commit="def")
    _write(folder, "fishertune_11", 64.0, 42.0)
    _write(folder, "random_q_10", 61.0, 39.0)
    _write(folder, "random_q_9", 60.0, 30.0)
    _write(folder, "freeze_10", 50.0, 20.0, tuned=0)
    (folder / "freeze_11").mkdir()  # not finished
    (folder / "notes.txt").touch()
    return folder


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_reads_rows_in_the_order_of_their_seeds(runs):
    read = rows.read_rows(runs)
    seeds = {row: [r["protocol"]["seed"] for r in results] for row, results in read.items()}
    assert seeds == {"fishertune": [9, 10, 11], "freeze": [10], "random_q": [9, 10]}
    assert list(seeds) == sorted(seeds)
    assert list(rows.read_rows(runs, ["random_q", "fishertune"])) == ["random_q", "fishertune"]


def test_table(runs):
    header, _, fishertune, freeze, random_q = map(
        _cells, rows.table(rows.read_rows(runs)).splitlines()
    )
    assert header == [
        *("row", "seeds", "backbone weights tuned", "day", "night", "mean of all test sets"),
        *("commits", "fishertune minus row"),
    ]
    # day 60, 62, 64; night 40, 44, 42; means 50, 53, 53: sqrt((4 + 1 + 1) / 2)
    assert fishertune == [
        *("fishertune", "3", "1.50 M", "62.00 ± 2.00", "42.00 ± 2.00", "52.00 ± 1.73"),
        *("abc, def", "-"),
    ]
    # Seed 10 alone: 53 - 35.
    expected = ["freeze", "1", "0.00 M", "50.00", "20.00", "35.00", "abc", "+18.00 (one seed)"]
    assert freeze == expected
    # Means 45 and 50; seed by seed 50 - 45 and 53 - 50: 4, and 12.706 standard errors of 1.
    assert random_q == [
        *("random_q", "2", "1.50 M", "60.50 ± 0.71", "34.50 ± 6.36", "47.50 ± 3.54"),
        *("abc", "+4.00 [-8.71, +16.71]"),
    ]


def test_no_difference_without_the_row_it_is_taken_from(runs):
    *_, line = rows.table(rows.read_rows(runs, ["random_q"])).splitlines()
    assert _cells(line)[-1] == "-"


def test_more_than_one_count_and_no_commit_are_shown(tmp_path):
    _write(tmp_path, "full_1", 1.0, 2.0, tuned=1_000_000, commit=None)
    _write(tmp_path, "full_2", 1.0, 2.0, tuned=2_000_000)
    *_, line = rows.table(rows.read_rows(tmp_path)).splitlines()
    assert _cells(line)[2] == "1.00 M, 2.00 M" and _cells(line)[-2] == "abc, unknown"


@pytest.mark.parametrize(
    ("unlike", "named"),
    [
        ({"steps": 8}, "differ in steps"),
        ({"window": 512}, "differ in window"),
        ({"targets": {"fog": 1.0}}, "differ in test sets"),
    ],
)
def test_refuses_unlike_runs_and_names_the_difference(runs, unlike, named):
    _write(runs, "unlike_9", 60.0, 40.0, **unlike)
    with pytest.raises(ValueError, match=f"unlike_9 was scored by another protocol.*{named};"):
        rows.read_rows(runs)
    assert list(rows.read_rows(runs, ["unlike"])) == ["unlike"]


def test_refuses_a_seed_that_is_not_the_folders(runs):
    _write(runs, "share_20", 60.0, 40.0, seed=42)
    with pytest.raises(ValueError, match="share_20 ran with seed 42"):
        rows.read_rows(runs)


def test_refuses_what_is_not_there(runs, tmp_path):
    with pytest.raises(ValueError, match="no finished run of 'random_k'"):
        rows.read_rows(runs, ["fishertune", "random_k"])
    with pytest.raises(ValueError, match="no finished run in"):
        rows.read_rows(tmp_path)


def test_draws_a_point_for_each_seed_and_a_bar_at_their_mean(runs, tmp_path, drawn):
    read = rows.scores_by_set(rows.read_rows(runs))
    rows.draw(read, tmp_path / "rows.png", {"freeze": {"night": 25.0}})
    (axes,) = drawn[0].axes
    points = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    bars = [bar.get_segments()[0][0, 0] for bar in axes.collections]
    crosses = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [[25]]
    assert points == [[60, 62, 64], [50], [60, 61], [40, 44, 42], [20], [30, 39]]
    assert bars == [62, 50, 60.5, 42, 20, 34.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(rows.read_rows(runs))


def test_the_command_prints_the_table_and_draws(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["rows", str(runs), "freeze", "fishertune"])
    runpy.run_path(rows.__file__, run_name="__main__")
    *table, last = capsys.readouterr().out.splitlines()
    assert [_cells(line)[0] for line in table[2:]] == ["freeze", "fishertune"]
    assert last == str(runs / "rows.png")
    assert np.asarray(Image.open(last)).std() > 0  # not blank
