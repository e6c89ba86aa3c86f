import csv
import json
import os
import resource
import signal
import sys
import threading
import time
from dataclasses import replace

import pytest

from fishertune_d2.bench import __main__ as bench
from fishertune_d2.bench.launch import execute
from fishertune_d2.bench.tables import PROFILES
from fishertune_d2.engine.preemption import EXIT_CODE

METHODS = ("--methods", "freeze", "full", "fisher", "fishertune")
WARMUP, ESTIMATE = "TUNING.WARMUP_CHECKPOINT", "FISHER.ESTIMATE"


def _refused(capsys, runs, *arguments, **options) -> str:
    with pytest.raises(SystemExit) as left:
        runs(*arguments, **options)
    assert left.value.code == 2 and runs.calls() == []
    return capsys.readouterr().err


def test_shares_one_warm_up_by_seed_and_one_estimate(runs, names):
    assert runs("selection", *METHODS, "--seeds", "42", "43") == 0
    calls = runs.calls()
    assert len(calls) == 8
    for seed in ("42", "43"):
        freeze, *others = (call for call in calls if call["options"]["SEED"] == seed)
        assert freeze["name"] == f"freeze_{seed}" and freeze["options"][WARMUP] == ""
        assert len({call["options"][WARMUP] for call in others}) == 1
        with open(others[0]["options"][WARMUP]) as file:
            assert file.read() == f"warm-up of freeze_{seed}"
        taken = {call["name"]: call["options"][ESTIMATE] for call in others}
        assert taken[f"full_{seed}"] == taken[f"fisher_{seed}"] == ""
        with open(taken[f"fishertune_{seed}"]) as file:
            assert file.read() == f"estimate of fisher_{seed}"
        # One copy on disk, under both names; the checkpoints of the middle are gone.
        kept = runs.cells / f"fishertune_{seed}/fisher.safetensors"
        assert kept.samefile(taken[f"fishertune_{seed}"])
        assert not list(runs.cells.glob("*/model_0*.pth"))


def test_a_finished_cell_is_not_repeated_and_new_ones_take_what_was_made(runs, names):
    assert runs("selection", "--methods", "fishertune") == 0
    (first,) = runs.calls()
    assert first["options"][WARMUP] == first["options"][ESTIMATE] == ""
    assert runs("selection", "--methods", "freeze", "fishertune", "eq7", "smoothed") == 0
    calls = runs.calls()
    assert sorted(names(calls)) == ["eq7_42", "freeze_42", "smoothed_42"]
    taken = {call["name"]: call["options"] for call in calls}
    assert all("warmup_42" in options[WARMUP] for options in taken.values())
    assert "fisher_42" in taken["eq7_42"][ESTIMATE] and taken["smoothed_42"][ESTIMATE] == ""


def test_what_changes_the_warm_up_is_not_shared(runs, monkeypatch):
    camvid = PROFILES["camvid"]
    monkeypatch.setitem(PROFILES, "camvid", replace(camvid, rates=()))  # no search before
    assert runs("sweep", "SOLVER.BASE_LR", "1e-3", "--methods", "freeze", "fisher") == 0
    freeze, fisher = runs.calls()
    assert freeze["options"]["SOLVER.BASE_LR"] == "1e-3"
    assert "warmup_42" in fisher["options"][WARMUP]  # entries with the same value share it
    assert runs("selection", "--methods", "random") == 0
    (random,) = runs.calls()
    assert random["options"][WARMUP] == ""


def test_a_killed_run_goes_on_and_says_so_by_its_exit_code(runs, names, capsys):
    runs.kill("full_42")
    with pytest.raises(SystemExit) as left:
        runs("selection", *METHODS)
    assert left.value.code == EXIT_CODE
    assert "run the same command to resume" in capsys.readouterr().err
    runs.calls()
    assert runs("selection", *METHODS) == 0
    (call,) = runs.calls()
    assert call["name"] == "full_42" and "--resume" in call["words"]
    attempts = json.loads((runs.cells / "full_42/cell.json").read_text())["attempts"]
    assert [attempt["exit_code"] for attempt in attempts] == [EXIT_CODE, 0]


def test_what_waits_for_a_failed_cell_is_left_and_named(runs, names, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_EXIT", "3")
    runs.kill("freeze_42")
    assert runs("selection", *METHODS) == 1
    assert names(runs.calls()) == ["freeze_42"]
    said = capsys.readouterr().err
    assert "failed with exit code 3: see" in said and "the warm-up that it takes is missing" in said
    assert "there is no table yet" in said


def test_a_cell_whose_results_were_cut_off_is_scored_again(runs):
    assert runs("selection", "--methods", "freeze") == 0
    runs.calls()
    results = runs.cells / "freeze_42/results.json"
    whole = results.read_text()
    results.write_text(whole[:50])
    assert runs("selection", "--methods", "freeze") == 0
    (call,) = runs.calls()
    assert "--eval-only" in call["words"]
    scored = runs.cells / "freeze_42/dev/results.json"
    assert scored.read_text() == whole


def test_sigterm_reaches_the_cell_that_runs(runs, tmp_path, capsys):
    (runs.folder / "fake.py").write_text(
        "import pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit({EXIT_CODE}))\n"
        f"pathlib.Path({str(tmp_path / 'ready')!r}).touch()\n"
        "time.sleep(60)\n"
    )

    def signal_when_ready() -> None:
        while not (tmp_path / "ready").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=signal_when_ready, daemon=True).start()
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        runs("selection", "--methods", "freeze", "full")
    assert left.value.code == EXIT_CODE and "stopped early" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is before
    attempts = json.loads((runs.cells / "freeze_42/cell.json").read_text())["attempts"]
    assert [attempt["exit_code"] for attempt in attempts] == [EXIT_CODE]
    assert not (runs.cells / "full_42").exists()


def test_records_what_was_run_and_what_it_took(runs):
    (runs.cells / "freeze_42").mkdir(parents=True)
    # As Detectron2 logs it where there is a GPU.
    (runs.cells / "freeze_42/log.txt").write_text("lr: 0.1  max_mem: 812M\nmax_mem: 1034M\n")
    assert runs("selection", "--methods", "freeze") == 0
    cell = json.loads((runs.cells / "freeze_42/cell.json").read_text())
    assert cell["recipe"]["TUNING.METHOD"] == "freeze" and cell["recipe"]["SEED"] == 42
    assert cell["config"] == "camvid/freeze.yaml" and "--resume" in cell["command"]
    assert {"torch", "detectron2", "timm", "transformers"} <= set(cell["versions"])
    (attempt,) = cell["attempts"]
    assert 0 < attempt["seconds"] == cell["seconds"] < 30 and attempt["commit"]
    assert cell["peak_memory_gb"] == attempt["peak_memory_gb"] > 0.001
    assert cell["peak_gpu_memory_mb"] == 1034


def test_measures_the_memory_of_the_command(tmp_path):
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # what it is never below
    size = own + 2 * 10**8
    command = [sys.executable, "-c", f"print(len(b'x' * {size}))"]
    attempt = execute(command, tmp_path / "log.txt", {})
    assert (tmp_path / "log.txt").read_text() == f"{size}\n"
    assert attempt.exit_code == 0
    assert size < attempt.peak_memory_gb * 1e9 < size + 10**8


def test_a_folder_with_another_recipe_is_refused(runs, capsys):
    assert runs("selection", "--methods", "freeze") == 0
    runs.calls()
    said = _refused(
        capsys, runs, "selection", "--methods", "freeze", "--set", "SOLVER.MAX_ITER", "900"
    )
    assert "freeze_42: SOLVER.MAX_ITER was 600 and is 900" in said


def test_search_chooses_on_the_dev_sets_and_later_seeds_use_the_choice(runs, names, capsys):
    runs.score({"full 0.3": 41.0, "full 1.0": 43.0, "full 3.0": 42.0, "fisher 3.0": 50.0})
    assert "not chosen yet for full on dinov2_vits, fisher" in _refused(
        capsys, runs, "table4", *METHODS[:-1]
    )
    assert runs("table4", *METHODS[:-1], "--search", "--seeds", "42", "43") == 0
    calls = runs.calls()
    assert sorted(names(calls)) == sorted(
        ["freeze_42"] + [f"{m}@rate={r}_42" for m in ("full", "fisher") for r in ("0.3", "1", "3")]
    )
    assert {call["options"]["DATASETS.TEST"] for call in calls} == {
        "('camvid_day_val', 'camvid_dusk_dev')"
    }
    said = capsys.readouterr().out
    assert "full: 1 of 0.3: 46.20, 1: 48.20, 3: 47.20\n" in said  # the mean of day and dusk
    assert "fisher: 3 of" in said and "at the edge" in said
    choices = json.loads((runs.cells / "choices.json").read_text())
    assert {method: choice["rate"] for method, choice in choices.items()} == {
        "full": 1.0,
        "fisher": 3.0,
    }

    assert runs("table4", *METHODS[:-1], "--seeds", "42", "43") == 0
    assert names(runs.calls()) == ["freeze_43", "full@rate=1_43", "fisher@rate=3_43"]


def test_a_later_search_adds_values(runs, names, capsys):
    runs.score({"full 0.3": 41.0, "full 1.0": 42.0, "full 3.0": 43.0, "full 10.0": 42.0})
    assert runs("table4", "--methods", "full", "--search") == 0
    runs.calls()
    assert runs("table4", "--methods", "full", "--search", "10") == 0
    assert names(runs.calls()) == ["full@rate=10_42"]
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "full: 3 of 0.3: 46.20, 1: 47.20, 3: 48.20, 10: 47.20"
    said = _refused(capsys, runs, "table4", "--methods", "full", "--search", "1", "--seeds", "43")
    assert "used seed 42 and camvid_day_val, camvid_dusk_dev, and this one uses seed 43" in said
    longer = "--set", "SOLVER.MAX_ITER", "1200"
    said = _refused(capsys, runs, "table4", "--methods", "full", "--search", "30", *longer)
    assert "full@rate=0.3_42 was a part of the search with other settings" in said
    assert "SOLVER.MAX_ITER was 600 and is 1200" in said and runs.calls() == []
    assert runs("table4", "--methods", "full", "--search", "--report") == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("full: 3 of")


def test_a_report_of_a_search_shows_what_was_tried(runs, capsys):
    runs.score({"full 10.0": 42.0, "full 30.0": 41.0})
    assert runs("table4", "--methods", "full", "--search", "10", "30") == 0
    runs.calls()
    said = capsys.readouterr().out.splitlines()
    assert said[-1].startswith("full: 10 of 10: 47.20, 30: 46.20")
    assert runs("table4", "--methods", "full", "--search", "--report") == 0 and runs.calls() == []
    assert capsys.readouterr().out.splitlines() == said


def test_search_of_unfinished_runs_leaves_the_choice_open(runs, capsys, monkeypatch):
    monkeypatch.setenv("FAKE_EXIT", "3")
    runs.kill("full@rate=1_42")
    assert runs("table4", "--methods", "full", "--search") == 1
    assert "full: still open" in capsys.readouterr().out
    runs.calls()
    assert "not chosen yet for full" in _refused(
        capsys, runs, "table4", "--methods", "full", "--test"
    )


def test_test_sets_are_looked_at_once_with_the_choice(runs, names, capsys):
    runs.score({"full 3.0": 50.0})
    only = ("table4", "--methods", "full", "--seeds", "42")
    assert runs(*only, "--search") == 0
    runs.calls()
    # Also a training that ended before it was scored has its scores on the test sets apart.
    own, away = (runs.cells / "full@rate=3_42" / name for name in ("results.json", "away.json"))
    own.rename(away)
    assert runs(*only, "--test") == 0
    away.rename(own)
    (call,) = runs.calls()
    assert "--eval-only" in call["words"] and call["name"] == "test"
    assert call["options"]["DATASETS.TEST"] == "('camvid_day_test', 'camvid_dusk_test')"
    assert call["options"]["MODEL.WEIGHTS"].endswith("full@rate=3_42/model_final.pth")
    assert (runs.output / "table4_test.csv").is_file()
    assert runs(*only, "--test") == 0 and runs.calls() == []
    assert "the test sets were scored" in _refused(capsys, runs, *only, "--search", "10")
    assert runs(*only, "--search", "--report") == 0 and runs.calls() == []
    assert "full: 3 of 0.3: " in capsys.readouterr().out
    assert "not trained yet" in _refused(
        capsys, runs, "table4", "--methods", "full", "--seeds", "43", "--test"
    )


def test_scenes_and_camvid_are_scored_at_once_and_averaged_apart(runs):
    only = ("table1", "--methods", "freeze", "fishertune")
    assert runs(*only, "--search", profile="streets") == 0
    assert runs(*only, profile="streets") == 0
    runs.calls()
    runs.score({"fishertune": 44.0})
    assert runs(*only, "--test", profile="streets") == 0
    assert len(runs.calls()) == 2
    seen = {}
    for end in ("camvid", "shifts"):
        with open(runs.output / f"table1_test_{end}.csv", newline="") as file:
            seen[end] = [line for line in csv.DictReader(file) if line["entry"] == "fishertune"]
    assert [line["set"] for line in seen["camvid"]] == [
        *("camvid_day_test", "camvid_dusk_test", "average over unseen")
    ]
    assert len(seen["shifts"]) == 7 and seen["shifts"][-1]["set"] == "average over unseen"
    assert not (runs.output / "table1_test.csv").exists()


def test_writes_csv_markdown_and_a_figure(runs, capsys):
    runs.score({"fishertune": 44.0, "full": 43.0, "freeze": 30.0})
    assert runs("selection", *METHODS[:3], "fishertune", "--seeds", "42", "43") == 0
    printed = capsys.readouterr().out
    assert printed.strip() == (runs.output / "selection.md").read_text().strip()
    assert "+1.00 [+1.00, +1.00]" in printed and "43.25 ± 0.07" in printed
    with open(runs.output / "selection.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    (full,) = (
        line for line in lines if line["entry"] == "full" and line["set"] == "camvid_dusk_dev"
    )
    assert float(full["mean"]) == pytest.approx(43.25) and full["seeds"] == "2"
    assert float(full["std"]) == pytest.approx(0.1 / 2**0.5, abs=1e-4)
    assert full["paper"] == "" and full["pairs"] == "2"
    assert (runs.output / "selection.png").stat().st_size > 1000


def test_refuses_what_it_does_not_know_before_anything_runs(runs, capsys):
    said = _refused(capsys, runs, "table4", "--methods", "full", "reign")
    assert "no tuning method for reign; there are" in said and "random_q" in said
    assert "TUNING.DMAX is no key" in _refused(capsys, runs, "sweep", "TUNING.DMAX", "0.1", "0.2")
    assert "write a sweep as" in _refused(capsys, runs, "sweep", "TUNING.D_MAX")
    assert "table4 takes no values: 1" in _refused(capsys, runs, "table4", "1")
    assert "keys and values in turn" in _refused(
        capsys, runs, "selection", "--methods", "full", "--set", "SEED"
    )
    assert "--test is for a profile with dev sets" in _refused(
        capsys, runs, "table4", "--methods", "full", "--test", profile="paper"
    )


def test_all_missing_data_are_said_at_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit):
        bench.main(["table1", "--methods", "full", "--output", str(tmp_path / "out")])
    said = capsys.readouterr().err
    for name in ("gtav_train", "cityscapes_val", "bdd100k_val", "mapillary_val"):
        assert f"{name}: no folder" in said


def test_a_rate_that_is_given_needs_no_search(runs, capsys):
    rate = ("--set", "SOLVER.BACKBONE_MULTIPLIER", "2.0")
    assert runs("table4", "--methods", "full", *rate) == 0
    (call,) = runs.calls()
    assert call["name"] == "full_42" and call["options"]["SOLVER.BACKBONE_MULTIPLIER"] == "2.0"
    said = _refused(capsys, runs, "table4", "--methods", "full", "--search", *rate)
    assert "no search" in said
    assert runs("sweep", "SOLVER.BACKBONE_MULTIPLIER", "2.0", "3.0", "--methods", "full") == 0
    names = [call["name"] for call in runs.calls()]
    assert names == [f"full@SOLVER.BACKBONE_MULTIPLIER={rate}_42" for rate in ("2.0", "3.0")]


def test_a_dry_run_prints_the_commands_and_runs_nothing(runs, capsys):
    assert runs("selection", *METHODS, "--dry-run") == 0
    said = capsys.readouterr().out
    assert runs.calls() == [] and not runs.output.exists()
    assert said.count("python -m fishertune_d2.train") == 4 and "makes the Fisher estimate" in said
    assert said.count("takes the warm-up") == 3 and "4 cells" in said


def test_a_dry_run_shows_rates_that_are_open(runs, capsys):
    table = ("table4", "--methods", "freeze", "full", "fisher")
    assert runs(*table, "--dry-run") == 0
    said = capsys.readouterr().out.splitlines()
    after = dict(zip(said, said[1:], strict=False))
    for name in ("full_42", "fisher_42"):
        assert after[str(runs.cells / name)] == "  rate: open, until --search has chosen it"
    assert after[str(runs.cells / "freeze_42")].startswith("  python -m fishertune_d2.train ")
    assert said[-1] == "3 cells"
    assert "not chosen yet for full" in _refused(capsys, runs, *table, "--report")
    assert runs("table4", "--methods", "full", "--search") == 0
    assert runs(*table, "--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count("rate: open") == 1 and "full@rate=0.3_42" in said


def test_each_process_of_a_cell_imports_the_users_files(runs, tmp_path):
    file = tmp_path / "own_of_the_bench.py"
    file.touch()
    assert runs("selection", "--methods", "full", "--import", str(file)) == 0
    (call,) = runs.calls()
    assert call["words"][:3] == ["--import", str(file), "--config-file"]


def test_an_unknown_vfm_is_refused(runs, capsys):
    assert "--vfm is 'dinov9': choose from dinov2_vits" in _refused(
        capsys, runs, "selection", "--methods", "full", "--vfm", "dinov9"
    )


def test_a_report_is_the_table_of_the_results_alone(runs, capsys, tmp_path):
    table = ("table4", "--methods", "freeze", "full", "--seeds", "42", "43")
    assert runs(*table, "--search") == 0
    runs.kill("freeze_43")
    with pytest.raises(SystemExit):
        runs(*table)
    capsys.readouterr()
    assert runs(*table, "--report") == 0
    partial = capsys.readouterr().out
    assert partial.count("| 1       |") == 2 and "Not finished: 2 of" in partial
    assert runs(*table) == 0
    whole = capsys.readouterr().out
    runs.calls()
    kept = tmp_path / "kept"
    for file in [*runs.cells.glob("*/results.json"), runs.cells / "choices.json"]:
        copy = kept / file.relative_to(runs.output)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    assert bench.main([*table, "--report", "--profile", "camvid", "--output", str(kept)]) == 0
    assert capsys.readouterr().out == whole and runs.calls() == []
    assert (kept / "table4.csv").read_text() == (runs.output / "table4.csv").read_text()


def test_jobs_side_by_side(runs, names):
    assert runs("selection", *METHODS, "--seeds", "42", "43", "--jobs", "4") == 0
    assert len(runs.calls()) == 8


def test_a_cell_waits_for_what_it_takes_and_for_nothing_else(runs, names):
    runs.hold("freeze_42", until="fishertune_43")
    assert runs("selection", *METHODS, "--seeds", "42", "43", "--jobs", "2") == 0
    order = names(runs.calls())
    assert len(order) == 8 and {*order[:2]} == {"freeze_42", "freeze_43"}
    assert {*order[-3:]} == {"full_42", "fisher_42", "fishertune_42"}


def test_submitit_is_optional_and_gets_each_command(runs, names, capsys, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "submitit", None)
    said = _refused(capsys, runs, "selection", "--methods", "freeze", "--submitit")
    assert "pip install submitit" in said

    class Executor:
        def __init__(self, folder):
            self.parameters = {}

        def update_parameters(self, **parameters):
            assert parameters == {"slurm_partition": "gpu", "timeout_min": 60}

        def submit(self, function, *arguments):
            def result(self):
                if "full_42" in str(arguments):
                    raise RuntimeError("node failure")
                return function(*arguments)

            return type("Job", (), {"result": result})()

    fake = type(sys)("submitit")
    fake.AutoExecutor = Executor
    monkeypatch.setitem(sys.modules, "submitit", fake)
    parameters = ("--submitit", "slurm_partition=gpu", "timeout_min=60")
    assert runs("selection", "--methods", "freeze", "full", *parameters) == 1
    assert names(runs.calls()) == ["freeze_42"]
    assert "node failure" in (runs.cells / "full_42/stdout.txt").read_text()
