import csv
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fishertune_d2.bench import result_table
from fishertune_d2.bench.cells import Cell
from fishertune_d2.bench.result_table import AVERAGE
from fishertune_d2.bench.tables import ENTRIES, PROFILES, TABLES, find_entry

SETS = ("day", "dusk", "night")


@pytest.fixture
def cell(tmp_path):
    """Returns a function that makes a finished cell with these scores."""

    def make(entry, seed, *scores, vfm="dinov2_vitl", **protocol) -> Cell:
        folder = tmp_path / vfm / f"{entry}_{seed}"
        folder.mkdir(parents=True)
        day, dusk, night = scores
        results = {
            "source": {"day": day},
            "targets": {"dusk": dusk, "night": night, "fog": 0.0},
            "target_average": None,
            "per_class": {name: {} for name in (*SETS, "fog")},
            "protocol": {
                "commit": "abc",
                "mode": "whole",
                "classes": {name: [] for name in (*SETS, "fog")},
                **protocol,
            },
            "backbone_parameters": 300_000_000,
            "tuned_parameters": 15_209_984,
        }
        (folder / "results.json").write_text(json.dumps(results))
        return Cell(find_entry(entry), vfm, seed, None, folder, "config", (), {})

    return make


def _finished(cells, sets=SETS):
    found = [(cell, cell.results(sets, "dev")) for cell in cells]
    return [(cell, results) for cell, results in found if results]


def test_table_of_several_models_with_the_papers_numbers(cell, tmp_path):
    cells = [
        cell("fishertune", 1, 60.0, 50.0, 40.0),
        cell("fishertune", 2, 62.0, 52.0, 46.0),
        cell("full", 1, 61.0, 48.0, 40.0),
        cell("full", 2, 61.0, 49.0, 41.0),
        cell("freeze", 2, 50.0, 30.0, 20.0),
        cell("full", 1, 1.0, 2.0, 3.0, vfm="eva02_vitl"),
    ]
    lines = result_table.read_lines(_finished(cells), SETS)
    paper = {("dinov2_vitl", "full", "dusk"): 47.5, ("dinov2_vitl", "full", AVERAGE): 44.0}
    text = result_table.write_table("T", lines, tmp_path / "t", paper=paper, missing=1)
    table = [line.strip("| ") for line in text.splitlines() if line.startswith("| dinov2")]
    ours, full, freeze = ([part.strip() for part in line.split("|")] for line in table)
    assert ours[5:] == ["61.00 ± 1.41", "51.00 ± 1.41", "43.00 ± 4.24", "47.00 ± 2.83", "-"]
    # Averages over the unseen asked for, not over fog: 45 and 49 against 44 and 45; 1 and 4.
    half = np.tan(np.pi * 0.475) * np.std([1, 4], ddof=1) / 2**0.5
    assert full[5:8] == ["61.00 ± 0.00", "48.50 ± 0.71 (47.5)", "40.50 ± 0.71"]
    assert full[8:] == ["44.50 ± 0.71 (44.0)", f"+2.50 [{2.5 - half:+.2f}, {2.5 + half:+.2f}]"]
    assert freeze[2] == "1" and freeze[-1] == "+24.00 (one seed)"
    assert "| eva02_vitl" in text and "Not finished: 1" in text and "15.21 M" in text

    with open(tmp_path / "t.csv", newline="") as file:
        written = {(line["vfm"], line["entry"], line["set"]): line for line in csv.DictReader(file)}
    assert written["dinov2_vitl", "full", "dusk"]["paper"] == "47.5"
    assert float(written["dinov2_vitl", "full", "dusk"]["fishertune_minus_entry"]) == 2.5
    assert written["dinov2_vitl", "freeze", AVERAGE]["low"] == ""
    assert written["eva02_vitl", "full", "day"]["fishertune_minus_entry"] == ""
    assert (tmp_path / "t.png").is_file()


@pytest.mark.parametrize(("key", "value"), [("mode", "slide"), ("precision", "bfloat16")])
def test_runs_that_were_scored_otherwise_are_not_compared(cell, key, value):
    cells = [cell("full", 1, 1, 2, 3), cell("freeze", 1, 1, 2, 3, **{key: value})]
    with pytest.raises(ValueError, match=f"freeze_1.* and .*full_1.* they differ in {key}"):
        result_table.read_lines(_finished(cells), SETS)


def test_the_table_names_the_protocol_and_refuses_two(cell):
    cells = [
        replace(cell(n, 1, 1, 2, 3, name="rein"), rules={"name": "rein"})
        for n in ("full", "freeze")
    ]
    text = result_table.format_markdown("T", result_table.read_lines(_finished(cells), SETS), {}, 0)
    assert " Protocol: rein.\n" in text
    cells.append(replace(cell("lora", 1, 1, 2, 3, name="tqdm"), rules={"name": "tqdm"}))
    with pytest.raises(ValueError, match=r"differ in the protocol's name \(tqdm and rein\)"):
        result_table.read_lines(_finished(cells), SETS)


def test_scores_under_another_protocol_than_the_configs_are_made_again(cell):
    trained = cell("full", 1, 1, 2, 3, name="rein")
    assert replace(trained, rules={"name": "rein"}).results(SETS, "dev")
    tqdm = replace(trained, rules={"name": "tqdm"})
    assert tqdm.results(SETS, "dev") is None
    again = json.loads((trained.folder / "results.json").read_text())
    again["protocol"]["name"] = "tqdm"
    (trained.folder / "dev").mkdir()
    (trained.folder / "dev/results.json").write_text(json.dumps(again))
    assert tqdm.results(SETS, "dev").protocol_name == "tqdm"
    assert replace(cell("lora", 1, 1, 2, 3), rules={"name": "tqdm"}).results(SETS, "dev")


@pytest.mark.parametrize(
    "rules",
    [
        {"mode": "slide", "crop": [512, 512]},
        {"mode": "slide"},
        {"class_rule": "union"},
        {"precision": "bfloat16"},
    ],
)
def test_scores_by_other_rules_are_made_again(cell, rules):
    trained = cell("full", 1, 1, 2, 3, mode="whole", class_rule="present")
    usual = {"name": "", "mode": "whole", "class_rule": "present", "precision": "float32"}
    assert replace(trained, rules=usual).results(SETS, "dev")
    assert replace(trained, rules=usual | rules).results(SETS, "dev") is None


def test_scores_on_labels_of_another_size_are_made_again(cell):
    trained = cell("full", 1, 1, 2, 3, halved_labels=["night"])
    assert replace(trained, halved=frozenset({"night"})).results(SETS, "dev")
    assert replace(trained, halved=frozenset()).results(SETS, "dev") is None
    older = cell("lora", 1, 1, 2, 3)  # did not record it
    assert replace(older, halved=frozenset({"night"})).results(SETS, "dev")


def test_scores_at_another_test_size_are_made_again(cell):
    sizes = {"day": [320, 240], "dusk": [320, 240], "night": None, "fog": [1, 1]}
    trained = cell("full", 1, 1, 2, 3, test_size=sizes)
    assert replace(trained, test_sizes={"day": (320, 240), "night": None}).results(SETS, "dev")
    for other in ({"dusk": None}, {"night": (320, 240)}):
        assert replace(trained, test_sizes=other).results(SETS, "dev") is None
    assert replace(trained, test_sizes={"fog": None}).results(SETS, "dev")  # the table has no fog


def test_the_results_of_the_first_selection_runs_are_still_read():
    table = Path(__file__).resolve().parents[2] / "docs/results/selection.jsonl"
    cells = [
        Cell(find_entry(name), vfm, seed, None, table / vfm / f"{name}_{seed}", "", (), {})
        for vfm, name in (("dinov2_vits", "fishertune"), ("dinov2_vits", "fisher"))
        for seed in (42, 43, 44)
    ]
    sets = PROFILES["camvid"].dev
    lines = result_table.read_lines(_finished(cells, sets), sets)
    (difference,) = result_table.differences(lines, "camvid_dusk_dev").values()
    assert difference.pairs == 3 and difference.low < difference.mean < difference.high


def test_papers_numbers_are_of_entries_sets_and_models_of_their_tables():
    for name, table in TABLES.items():
        numbers = result_table.paper_numbers(table.paper)
        assert bool(numbers) == bool(table.paper), name
        for vfm, entry, key in numbers:
            assert vfm in table.vfms and entry in table.entries and key in (*table.test, AVERAGE)
    assert result_table.paper_numbers("table1")["dinov2_vitl", "fishertune", AVERAGE] == 66.5
    assert result_table.paper_numbers("table2")["eva02_vitl", "rein", "acdc_val"] == 70.9
    assert result_table.paper_numbers("table4")["eva02_vitl", "delta_fisher", "bdd100k_val"] == 63.1
    assert result_table.paper_numbers("table5")["eva02_vitl", "vpt_fp", AVERAGE] == 61.8


def test_every_entry_of_every_table_can_be_found():
    for table in TABLES.values():
        assert len(set(table.entries)) == len(table.entries)
        assert all(find_entry(name).name == name for name in table.entries)
    assert all(len(entry.options) % 2 == 0 for entry in ENTRIES.values())
