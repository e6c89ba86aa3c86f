"""Reading a run's folder, and deciding whether the scores of two runs can be compared."""

import json
from copy import deepcopy

import pytest

from fishertune_d2.config import default_config
from fishertune_d2.run import ENTRY, LENGTH, Results, Run, RunError, require_same_protocol

DAY, DUSK = "camvid_day_test", "camvid_dusk_test"
CONTENT = {
    "source": {DAY: 60.0},
    "targets": {DUSK: 40.0},
    "target_average": 40.0,
    "per_class": {DAY: {"road": 60.0}, DUSK: {"road": 40.0}},
    "protocol": {
        "mode": "slide",
        "crop": [256, 256],
        "train": ["camvid_day_train"],
        "vfm": "dinov2_vits",
        "method": "full",
        "seed": 42,
        "iterations": 300,
        "commit": "0123abc",
        "test_size": {DAY: [480, 360], DUSK: None},
        "halved_labels": [],
        "classes": {DAY: ["road"], DUSK: ["road"]},
    },
    "backbone_parameters": 100,
    "tuned_parameters": 5,
}


def results(**facts) -> Results:
    """Results whose protocol differs from CONTENT's in these facts; None takes a fact away."""
    content = deepcopy(CONTENT)
    content["protocol"] |= facts
    content["protocol"] = {k: v for k, v in content["protocol"].items() if v is not None}
    return Results.of(content, f"run with {facts}")


@pytest.mark.parametrize(
    ("facts", "named"),
    [
        ({"mode": "whole"}, "mode"),
        ({"crop": [512, 512]}, "crop"),
        ({"train": ["streets_day_train"]}, "train"),
        ({"iterations": 900}, "iterations"),
        ({"vfm": "dinov2_vitl"}, "vfm"),
        ({"precision": "bfloat16"}, "precision"),
        ({"test_size": {DAY: [480, 360], DUSK: [480, 360]}}, f"test_size of {DUSK}"),
        ({"classes": {DAY: ["road"], DUSK: ["sky"]}}, f"classes of {DUSK}"),
        ({"halved_labels": [DAY]}, f"halved labels of {DAY}"),
        ({"name": "tqdm"}, r"the protocol's name \(tqdm and rein\)"),
        ({"label_map": {DAY: "camvid", DUSK: "other"}}, f"label_map of {DUSK}"),
    ],
)
def test_scores_of_another_protocol_are_not_compared(facts, named):
    one = results(name="rein", label_map={DAY: "camvid", DUSK: "camvid"})
    with pytest.raises(ValueError, match=f"differ in {named}. Compare runs that are alike"):
        require_same_protocol([one, results(**facts)], vary=ENTRY)


def test_facts_that_may_vary_are_the_callers_choice():
    other = results(method="lora", seed=43, iterations=900, commit="fff")
    require_same_protocol([results(), other], vary=(*ENTRY, *LENGTH, "seed"))
    with pytest.raises(ValueError, match="differ in seed, iterations"):
        require_same_protocol([results(), other], vary=ENTRY)


def test_facts_that_earlier_versions_did_not_record_are_not_compared():
    require_same_protocol([results(), results(vfm=None, halved_labels=None)], vary=ENTRY)


def test_runs_behind_one_that_recorded_less_are_compared_with_each_other():
    maps = [{DAY: "camvid", DUSK: name} for name in ("camvid", "other")]
    later = [results(label_map=label_map) for label_map in maps]
    with pytest.raises(ValueError, match=f"differ in label_map of {DUSK}"):
        require_same_protocol([results(), *later], vary=ENTRY)


def test_a_protocol_has_its_recorded_name_or_the_one_that_fits():
    assert results().protocol_name == ""  # without its class rule
    assert results(name="tqdm").protocol_name == "tqdm"
    files = {"test_size": {DAY: None, DUSK: None}, "class_rule": "present"}
    assert results(**files).protocol_name == "native"
    assert results(**files, halved_labels=None).protocol_name == "native"


def test_other_test_sets_are_named_unless_the_caller_chooses_the_sets():
    content = deepcopy(CONTENT)
    content["targets"] = {}
    one, other = results(), Results.of(content, "a run by day")
    with pytest.raises(ValueError, match="differ in test sets"):
        require_same_protocol([one, other], vary=ENTRY)
    require_same_protocol([one, other], vary=ENTRY, sets=[DAY])


def test_a_folder_says_which_part_it_lacks(tmp_path):
    run = Run(tmp_path)
    assert run.results is None and run.metrics == {} and run.versions == {}
    for read in (lambda: run.config, lambda: run.config_text):
        with pytest.raises(RunError, match="no .*config.yaml: name the OUTPUT_DIR of a run"):
            read()
    with pytest.raises(RunError, match="no fisher.safetensors in .* estimated nothing"):
        run.load_estimate()
    with pytest.raises(RunError, match="no selection.safetensors in .* selected nothing"):
        run.load_selection()
    with pytest.raises(RunError, match="no .*results.json: its run is not scored yet"):
        Results.read(run.results_file)


def test_the_config_names_what_differs_from_the_defaults(tmp_path):
    cfg = default_config()
    cfg.merge_from_list(["SEED", "7", "DATASETS.TEST", "('town',)"])
    (tmp_path / "config.yaml").write_text(cfg.dump() + "NEW_KEY_OF_A_LATER_VERSION: 3\n")
    run = Run(tmp_path)
    assert run.changed == {
        "SEED": 7,
        "DATASETS.TEST": ["town"],
        "NEW_KEY_OF_A_LATER_VERSION": 3,
    }
    assert run.config["TUNING.D_MAX"] == cfg.TUNING.D_MAX


def test_the_former_way_to_read_a_folder_still_works(tmp_path):
    former = pytest.warns(FutureWarning, match=r"Run.read\(folder\) is now Run\(Path\(folder\)\)")
    with former, pytest.raises(RunError, match="no .*config.yaml"):
        Run.read(tmp_path)
    (tmp_path / "config.yaml").write_text(default_config().dump())
    with pytest.warns(FutureWarning):
        assert Run.read(str(tmp_path)) == Run(tmp_path)


def test_later_numbers_of_an_iteration_count(tmp_path):
    lines = [{"iteration": 19, "lr": 1.0}, {"iteration": 39, "lr": 2.0}, {"iteration": 19, "lr": 3}]
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"iteration": 59, "l'
    (tmp_path / "metrics.json").write_text(text)
    assert Run(tmp_path).series("lr") == [(19, 3), (39, 2.0)]
