import json
import runpy
import sys

import pytest

from fishertune_d2.analysis.compare import compare, compare_classes
from fishertune_d2.analysis.study import StudyRun, save_runs


def _write(folder, method, average=30.0, **protocol):
    folder.mkdir()
    results = {
        "source": {"day": 61.234},
        "targets": {"dusk": 40.0, "night": 20.0},
        "target_average": average,
        "per_class": {"day": {"sky": 61.234}, "dusk": {"car": 50.0, "sky": 30.0}, "night": {}},
        "tuned_parameters": 1_500_000,
        "backbone_parameters": 30_000_000,
        "protocol": {
            "vfm": "dinov2_vitl",
            "method": method,
            "commit": "abc",
            "seed": 1,
            "classes": {name: ["sky", "rider", "car"] for name in ("day", "dusk", "night")},
            **protocol,
        },
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


@pytest.fixture
def runs(tmp_path):
    return [
        _write(tmp_path / "a", "full"),
        _write(tmp_path / "b", "freeze", vfm="eva02_vitl", commit="def"),
    ]


def _cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_line_for_each_run(runs):
    header, _, first, second, _, protocol = compare(runs).splitlines()
    assert _cells(header)[3:7] == ["day", "dusk", "night", "average over unseen"]
    scores = ["61.23", "40.00", "20.00", "30.00"]
    assert _cells(first) == ["dinov2_vitl", "full", "1.50 M", *scores, "abc"]
    assert _cells(second) == ["eva02_vitl", "freeze", "1.50 M", *scores, "def"]
    assert protocol == "Protocol: seed 1"


def test_the_name_of_the_protocol_comes_first(tmp_path):
    facts = {"name": "tqdm", "mode": "slide", "label_map": {"day": "camvid"}}
    runs = [_write(tmp_path / name, name, **facts) for name in ("full", "freeze")]
    assert compare(runs).endswith("\n\nProtocol: tqdm, seed 1, mode slide")


def test_perturbed_features_are_named(tmp_path):
    runs = [_write(tmp_path / str(on), "vpt", feature_perturbation=on) for on in (False, True)]
    _, _, plain, perturbed, *_ = compare(runs).splitlines()
    assert (_cells(plain)[1], _cells(perturbed)[1]) == ("vpt", "vpt, perturbed")


def test_runs_of_one_method_are_told_apart(tmp_path):
    configs = (
        "TUNING: {UNIT: weight}",
        "TUNING: {UNIT: neuron, ALLOCATION: layer, STEPS: fisher}",
        "FISHER: {PERTURB: {KIND: night}}",
    )
    runs = [_write(tmp_path / str(i), "fishertune") for i in range(len(configs))]
    for run, config in zip(runs, configs, strict=True):
        (run / "config.yaml").write_text(config)
    assert [_cells(line)[1] for line in compare(runs).splitlines()[2:5]] == [
        "fishertune",
        "fishertune, unit neuron, allocation layer, steps fisher",
        "fishertune, shift night",
    ]


def test_runs_without_unseen_domains_have_no_average(tmp_path):
    text = compare([_write(tmp_path / "a", "full", average=None)])
    assert _cells(text.splitlines()[2])[6] == "-"


def test_a_column_for_each_class(runs):
    header, _, first, second, _, protocol = compare_classes(runs, "dusk").splitlines()
    assert _cells(header)[3:] == ["sky", "rider", "car", "mIoU of dusk", "commit"]
    # In the order of the classes, not of the file; nobody rides in the labels.
    assert _cells(first)[2:] == ["1.50 M", "30.00", "-", "50.00", "40.00", "abc"]
    assert _cells(second)[0] == "eva02_vitl" and protocol == "Protocol: seed 1"


def test_classes_of_a_data_set_that_was_not_tested(runs):
    with pytest.raises(ValueError, match="not tested on 'fog'; choose one of day, dusk, night"):
        compare_classes(runs, "fog")


@pytest.mark.parametrize("table", [compare, lambda runs: compare_classes(runs, "day")])
def test_refuses_to_compare_unlike_runs(tmp_path, table):
    runs = [_write(tmp_path / "a", "full"), _write(tmp_path / "b", "freeze", seed=2)]
    with pytest.raises(ValueError, match="different protocols or data: they differ in seed"):
        table(runs)


@pytest.mark.parametrize(("option", "column"), [([], "dusk"), (["--classes", "dusk"], "sky")])
def test_the_command(runs, option, column, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compare", *map(str, runs), *option])
    monkeypatch.delitem(sys.modules, "fishertune_d2.analysis.compare")
    runpy.run_module("fishertune_d2.analysis.compare", run_name="__main__")
    assert column in _cells(capsys.readouterr().out.splitlines()[0])


def test_runs_of_a_table_are_compared_as_those_of_folders(runs, tmp_path):
    table = tmp_path / "study.jsonl"
    contents = [json.loads((run / "results.json").read_text()) for run in runs]
    save_runs(
        table,
        [
            StudyRun(f"vit/{run.name}", "", "vit", (), 1, None, None, None, content)
            for run, content in zip(runs, contents, strict=True)
        ],
    )
    assert compare([table / "vit/a", table / "vit/b"]) == compare(runs)
    with pytest.raises(ValueError, match="study.jsonl has no run 'vit/c'"):
        compare([table / "vit/c"])
