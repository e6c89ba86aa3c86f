"""Profiles of long training: a shorter search, scores along the training, and the best step."""

import json
from pathlib import Path

import pytest

from fishertune_d2.analysis.curves import draw_curves, read_curves, table_of
from fishertune_d2.analysis.study import read_table
from fishertune_d2.bench import __main__ as bench
from fishertune_d2.run import RunError

COMMAND = ("curves", "--methods", "freeze", "full", "--vfm", "dinov2_vits")
SETS = {"camvid_day_val": 30.0, "camvid_dusk_dev": 20.0}


def log_scores(folder: Path, gain: float) -> None:
    """Writes the log of a training that was scored at 250, at 500 and at its end, at 600."""
    lines = [{"iteration": 100, "total_loss": 1.0}]
    # Detectron2 logs the last evaluation after the last iteration.
    for step, iteration in ((1, 249), (2, 499), (0, 600)):
        scores = {f"{name}/sem_seg/mIoU": start + step * gain for name, start in SETS.items()}
        lines.append({"iteration": iteration, **scores})
    (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
    (folder / "config.yaml").write_text("SOLVER: {MAX_ITER: 600}")
    (folder / "model_best.pth").touch()


@pytest.fixture(scope="module")
def study(shared_runs) -> Path:
    """The table of a search, of a training that was scored twice, and of its test."""
    runs, table = shared_runs, shared_runs.folder / "study.jsonl"
    runs.score({"full 0.1": 40.0, "full 0.3": 45.0})
    for stage in (["--search", "0.1", "0.3"], [], ["--test"]):
        if stage == ["--test"]:
            log_scores(runs.cells / "freeze_42", gain=1.0)
            log_scores(runs.cells / "full@rate=0.3_42", gain=4.0)
            shared_runs.calls()
        assert runs(*COMMAND, *stage, "--save", str(table), profile="streets_long") == 0
    assert runs(*COMMAND, "--report", "--save", str(table), profile="streets_long") == 0
    return table


def test_a_search_trains_for_a_quarter_and_chooses_the_rate_of_the_table(runs):
    runs.score({"full 0.1": 40.0, "full 0.3": 45.0})
    assert runs(*COMMAND, "--search", "0.1", "0.3", profile="streets_long") == 0
    for call in runs.calls():
        assert call["options"]["SOLVER.MAX_ITER"] == "1250"
        assert "/search/dinov2_vits/" in call["options"]["OUTPUT_DIR"]
    assert runs(*COMMAND, profile="streets_long") == 0
    calls = runs.calls()
    assert [call["name"] for call in calls] == ["freeze_42", "full@rate=0.3_42"]
    assert all("SOLVER.MAX_ITER" not in call["options"] for call in calls)


def test_the_choice_is_read_from_the_searchs_cells_of_a_table(study, capsys):
    command = [*COMMAND, "--profile", "streets_long", "--output", str(study)]
    assert bench.main([*command, "--search", "--report"]) == 0
    assert "full: 0.3 of 0.1: 45.20, 0.3: 50.20" in capsys.readouterr().out


def test_the_test_sets_see_the_best_checkpoint(study, shared_runs):
    calls = shared_runs.calls()
    assert [Path(call["options"]["MODEL.WEIGHTS"]).name for call in calls] == ["model_best.pth"] * 2
    assert all(call["options"]["TEST.BEST_ON"] == "" for call in calls)  # it is no test set


def test_saved_runs_have_their_curves(study):
    runs = {run.run: run for run in read_table(study)}
    curves = runs["dinov2_vits/full@rate=0.3_42"].content["curves"]
    assert curves == {"camvid_day_val": [[250, 34], [500, 38], [600, 30]],
                      "camvid_dusk_dev": [[250, 24], [500, 28], [600, 20]]}  # fmt: skip
    assert "curves" not in runs["dinov2_vits/full@rate=0.3_42/test"].content
    assert "curves" not in runs["search/dinov2_vits/full@rate=0.1_42"].content


def test_the_table_and_the_figure_show_the_mean_over_the_unseen_sets(study, tmp_path):
    curves = read_curves(study)
    unseen = ["camvid_dusk_dev"]  # the fake run calls sets by day its source
    expected = sum(SETS[name] for name in unseen) / len(unseen)
    assert curves["full@rate=0.3"] == {
        42: [(250, expected + 4), (500, expected + 8), (600, expected)]
    }
    line = table_of(curves, [250, 600, 5000]).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")[1:-1]] == [
        "full@rate=0.3", "1", "24.00", "20.00", "-", "28.00", "500"
    ]  # fmt: skip
    draw_curves(curves, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 5000


def test_each_rate_and_model_has_its_own_curve(study, tmp_path):
    lines = [json.loads(line) for line in study.read_text().splitlines()]
    (line,) = [line for line in lines if line["run"] == "dinov2_vits/full@rate=0.3_42"]
    others = ("dinov2_vits/full@rate=1_42", 1.0), ("dinov2_vits/full@rate=0.3_43", 0.3)
    lines += [line | {"run": run, "rate": rate, "seed": int(run[-2:])} for run, rate in others]
    table = tmp_path / "rates.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)))
    found = {name: list(seeds) for name, seeds in read_curves(table).items()}
    assert found == {"freeze": [42], "full@rate=0.3": [42, 43], "full@rate=1": [42]}
    other = line | {"run": "dinov2_vitb/full@rate=0.3_42", "vfm": "dinov2_vitb"}
    table.write_text("\n".join(map(json.dumps, [*lines, other])))
    assert {"dinov2_vitb, full@rate=0.3", "dinov2_vits, freeze"} <= read_curves(table).keys()
    # A search has curves too if its config is scored in between; a table may have two sources.
    searched = line | {"run": f"search/{line['run']}", "curves": {"camvid_dusk_dev": [[250, 99]]}}
    source = line | {"run": f"other/{line['run']}", "train": ["camvid_day_train"]}
    table.write_text("\n".join(map(json.dumps, [line, searched, source])))
    assert {name: seeds[42][0] for name, seeds in read_curves(table).items()} == {
        "streets_day_train, full@rate=0.3": (250, 24),
        "camvid_day_train, full@rate=0.3": (250, 24),
    }


def test_a_table_without_curves_is_refused(study, tmp_path):
    lines = [line for line in study.read_text().splitlines() if '"curves"' not in line]
    table = tmp_path / "plain.jsonl"
    table.write_text("\n".join(lines))
    with pytest.raises(RunError, match="train with TEST.EVAL_PERIOD"):
        read_curves(table)
