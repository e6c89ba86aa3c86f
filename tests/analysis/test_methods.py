import json
import runpy
import sys

import numpy as np
import pytest
from PIL import Image

from fishertune_d2.analysis import methods
from fishertune_d2.analysis.study import StudyRun, save_runs


def _results(name, day, night, tuned=1_500_000, targets=None, **protocol):
    method, _, seed = name.rpartition("_")
    targets = {"night": night} if targets is None else targets
    sets = ("day", *targets)
    return {
        "source": {"day": day},
        "targets": targets,
        "target_average": None,
        "per_class": {name: {} for name in sets},
        "protocol": {
            "method": method,
            "commit": "abc",
            "seed": int(seed),
            "steps": 9,
            "classes": {name: [] for name in sets},
            **protocol,
        },
        "tuned_parameters": tuned,
        "backbone_parameters": 30_000_000,
    }


def _write(folder, name, *scores, **options):
    results = _results(name.removesuffix("/test"), *scores, **options)
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


def test_reads_methods_in_the_order_of_their_seeds(runs):
    read = methods.read_methods(runs)
    seeds = {method: [results.seed for results in found] for method, found in read.items()}
    assert seeds == {"fishertune": [9, 10, 11], "freeze": [10], "random_q": [9, 10]}
    assert list(seeds) == sorted(seeds)
    assert list(methods.read_methods(runs, ["random_q", "fishertune"])) == [
        "random_q",
        "fishertune",
    ]


def test_table(runs):
    lines = methods.table(methods.read_methods(runs)).splitlines()
    header, _, fishertune, freeze, random_q = map(_cells, lines)
    assert header == [
        *("method", "seeds", "backbone weights tuned", "day", "night", "mean of all test sets"),
        *("commits", "fishertune minus method"),
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


def test_no_difference_without_the_method_it_is_taken_from(runs):
    *_, line = methods.table(methods.read_methods(runs, ["random_q"])).splitlines()
    assert _cells(line)[-1] == "-"


def test_more_than_one_count_and_no_commit_are_shown(tmp_path):
    _write(tmp_path, "full_1", 1.0, 2.0, tuned=1_000_000, commit=None)
    _write(tmp_path, "full_2", 1.0, 2.0, tuned=2_000_000)
    *_, line = methods.table(methods.read_methods(tmp_path)).splitlines()
    assert _cells(line)[2] == "1.00 M, 2.00 M" and _cells(line)[-2] == "abc, unknown"


@pytest.mark.parametrize(
    ("unlike", "named"),
    [
        ({"steps": 8}, "differ in steps"),
        ({"targets": {"fog": 1.0}}, "differ in test sets"),
    ],
)
def test_refuses_unlike_runs_and_names_the_difference(runs, unlike, named):
    _write(runs, "unlike_9", 60.0, 40.0, **unlike)
    with pytest.raises(ValueError, match=f"unlike_9.* have different protocols.*{named}\\. "):
        methods.read_methods(runs)
    assert list(methods.read_methods(runs, ["unlike"])) == ["unlike"]


def test_refuses_a_seed_that_is_not_the_folders(runs):
    _write(runs, "share_20", 60.0, 40.0, seed=42)
    with pytest.raises(ValueError, match="share_20 ran with seed 42"):
        methods.read_methods(runs)


def test_refuses_what_is_not_there(runs, tmp_path):
    with pytest.raises(ValueError, match="no finished run of 'random_k'"):
        methods.read_methods(runs, ["fishertune", "random_k"])
    with pytest.raises(ValueError, match="no finished run in"):
        methods.read_methods(tmp_path)


def test_draws_a_point_for_each_seed_and_a_bar_at_their_mean(runs, tmp_path, drawn):
    read = methods.scores_by_set(methods.read_methods(runs))
    methods.draw(read, tmp_path / "methods.png", {"freeze": {"night": 25.0}})
    (axes,) = drawn[0].axes
    points = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "o"]
    bars = [bar.get_segments()[0][0, 0] for bar in axes.collections]
    crosses = [list(line.get_xdata()) for line in axes.lines if line.get_marker() == "x"]
    assert crosses == [[25]]
    assert points == [[60, 62, 64], [50], [60, 61], [40, 44, 42], [20], [30, 39]]
    assert bars == [62, 50, 60.5, 42, 20, 34.5]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(
        methods.read_methods(runs)
    )


def test_the_command_prints_the_table_and_draws(runs, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["methods", str(runs), "freeze", "fishertune"])
    runpy.run_path(methods.__file__, run_name="__main__")
    *table, last = capsys.readouterr().out.splitlines()
    assert [_cells(line)[0] for line in table[2:]] == ["freeze", "fishertune"]
    assert last == str(runs / "methods.png")
    assert np.asarray(Image.open(last)).std() > 0  # not blank


def test_the_scores_on_the_test_sets_and_a_table_of_runs_read_the_same(runs, tmp_path):
    _write(runs, "freeze_10/test", 48.0, 21.0)
    _write(runs, "fishertune_10/test", 59.0, 43.0)
    table = tmp_path / "study.jsonl"
    save_runs(
        table,
        [
            StudyRun(
                str(file.parent.relative_to(runs)), "", "vit", (), 1, None, None, None, content
            )
            for file in runs.rglob("results.json")
            for content in [json.loads(file.read_text())]
        ],
    )
    for test in (False, True):
        of_folder, of_table = (methods.read_methods(place, test=test) for place in (runs, table))
        assert methods.table(of_folder) == methods.table(of_table)
    assert of_table["freeze"][0].scores == {"day": 48.0, "night": 21.0}
    with pytest.raises(ValueError, match="no finished run of 'random_q' in .*<seed>/test"):
        methods.read_methods(table, ["random_q"], test=True)


def test_the_old_command_says_its_new_name(runs, tmp_path, monkeypatch, capsys):
    picture = str(tmp_path / "picture.png")
    monkeypatch.setattr(sys, "argv", ["rows", str(runs), "freeze", "--output", picture])
    monkeypatch.delitem(sys.modules, "fishertune_d2.analysis.rows", raising=False)
    runpy.run_module("fishertune_d2.analysis.rows", run_name="__main__")
    told = capsys.readouterr()
    assert "is now called fishertune_d2.analysis.methods" in told.err
    assert told.out.splitlines()[-1] == picture
