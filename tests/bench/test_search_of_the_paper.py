"""The search in the paper's setting: on held-out images of the source, never on a target."""

import json

import pytest

from fishertune_d2.bench.tables import PROFILES, TABLES
from fishertune_d2.data.registration import DatasetCatalog

COMMAND = ("table1", "--methods", "freeze", "full", "--vfm", "dinov2_vitl")
TEST = "('cityscapes_val', 'bdd100k_val', 'mapillary_val')"


@pytest.fixture
def searched(runs) -> list[dict]:
    """The calls of a search over two rates, of which 0.3 is better."""
    runs.score({"full 0.1": 40.0, "full 0.3": 45.0})
    assert runs(*COMMAND, "--search", "0.1", "0.3", profile="paper") == 0
    return runs.calls()


def test_it_trains_without_the_held_out_images_and_scores_them(searched):
    assert [call["name"] for call in searched] == [
        "freeze_42", "full@rate=0.1_42", "full@rate=0.3_42"
    ]  # fmt: skip
    for call in searched:
        assert call["options"]["DATASETS.TRAIN"] == "('gtav_search_train',)"
        assert call["options"]["DATASETS.TEST"] == (
            "('gtav_search_dev', 'gtav_search_dev_fog', 'gtav_search_dev_night')"
        )
        assert "/search/dinov2_vitl/" in call["options"]["OUTPUT_DIR"]


def test_the_table_trains_on_the_whole_source_with_the_chosen_rate(searched, runs):
    choices = json.loads((runs.output / "dinov2_vitl/choices.json").read_text())
    assert choices["full"]["rate"] == 0.3
    assert runs(*COMMAND, profile="paper") == 0
    calls = runs.calls()
    assert [call["name"] for call in calls] == ["freeze_42", "full@rate=0.3_42"]
    for call in calls:
        assert "DATASETS.TRAIN" not in call["options"]  # that of the config
        assert call["options"]["DATASETS.TEST"] == TEST
        assert "/search/" not in call["options"]["OUTPUT_DIR"]


def test_without_a_search_the_configs_give_the_rates(runs):
    assert runs(*COMMAND, profile="paper") == 0
    calls = runs.calls()
    assert [call["name"] for call in calls] == ["freeze_42", "full_42"]
    assert all("SOLVER.BACKBONE_MULTIPLIER" not in call["options"] for call in calls)


def test_after_the_test_sets_were_scored_a_new_search_is_refused(searched, runs, capsys):
    assert runs(*COMMAND, profile="paper") == 0
    with pytest.raises(SystemExit):
        runs(*COMMAND, "--search", "1", profile="paper")
    assert "the test sets were scored with the chosen" in capsys.readouterr().err
    runs.calls()
    assert runs(*COMMAND, "--search", "--report", profile="paper") == 0
    assert "full: 0.3 of 0.1: 40.20, 0.3: 45.20" in capsys.readouterr().out
    assert runs.calls() == []


def test_every_table_of_the_paper_has_registered_dev_sets_of_its_source():
    profile = PROFILES["paper"]
    for table in TABLES.values():
        train, dev = profile.held_out[table.source]
        assert {train, *dev} <= set(DatasetCatalog.list())
        assert not {train, *dev} & set(table.test)
