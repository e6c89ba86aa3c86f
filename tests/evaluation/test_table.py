import json

import pytest

from fishertune_d2.data import SegmentationMapper
from fishertune_d2.evaluation import format_table, summarize
from fishertune_d2.evaluation.table import domains_overlap

RESULTS = {
    "camvid_day_test": {"sem_seg": {"mIoU": 60.0, "IoU-sky": 90.0}},
    "camvid_dusk_test": {"sem_seg": {"mIoU": 40.0, "IoU-sky": 50.0, "IoU-car": 30.0}},
    "cityscapes_val": {"sem_seg": {"mIoU": 30.0, "IoU-road": 80.0}},
}
PROTOCOL = {"mode": "slide", "class_rule": "present"}
MAPPER = SegmentationMapper(is_train=False)


def test_the_domain_decides_what_is_source():
    summary = summarize(RESULTS, ["camvid_day_train"], PROTOCOL, MAPPER)
    assert summary["source"] == {"camvid_day_test": 60.0}
    assert summary["targets"] == {"camvid_dusk_test": 40.0, "cityscapes_val": 30.0}
    assert summary["target_average"] == 35.0
    assert summary["per_class"]["camvid_dusk_test"] == {"sky": 50.0, "car": 30.0}


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("acdc/fog", "acdc/fog", True),
        ("acdc", "acdc/fog", True),
        ("acdc", "acdc/fog/dense", True),
        ("acdc/fog", "acdc/night", False),
        ("acdc", "acdc2", False),
        ("acdc/fog", "acdc/fog2", False),
        ("fog", "acdc/fog", False),
        ("camvid_day", "camvid_dusk", False),
        ("camvid_day", "streets_day", False),
        ("camvid/day", "streets/day", False),
    ],
)
def test_domains_overlap_where_one_is_the_other_or_part_of_it(one, other, overlap):
    assert domains_overlap(one, other) is domains_overlap(other, one) is overlap


@pytest.mark.parametrize(
    ("trained", "sources"),
    [
        ("acdc_train", ["acdc_val", "acdc_fog_val", "acdc_night_val"]),
        ("acdc_fog_train", ["acdc_val", "acdc_fog_val"]),
        ("cityscapes_train", ["cityscapes_val"]),
    ],
)
def test_a_whole_and_its_parts_are_sources_of_each_other(trained, sources):
    tested = ["acdc_val", "acdc_fog_val", "acdc_night_val", "cityscapes_val"]
    results = {name: {"sem_seg": {"mIoU": 50.0}} for name in tested}
    summary = summarize(results, ["gtav_train", trained], PROTOCOL, MAPPER)
    assert list(summary["source"]) == sources
    assert list(summary["targets"]) == [name for name in tested if name not in sources]


def test_the_protocol_is_written_with_each_data_sets_own():
    protocol = summarize(RESULTS, ["camvid_day_train"], PROTOCOL, MAPPER)["protocol"]
    assert protocol["mode"] == "slide" and protocol["class_rule"] == "present"
    assert protocol["test_size"]["cityscapes_val"] == [1024, 512]
    assert protocol["test_size"]["camvid_day_test"] is None
    assert len(protocol["classes"]["camvid_day_test"]) == 11
    assert len(protocol["classes"]["cityscapes_val"]) == 19


def test_the_protocol_tells_what_a_person_chose():
    results = {"mapillary_val": {"sem_seg": {"mIoU": 50.0}}, **RESULTS}
    default = summarize(results, ["camvid_day_train"], PROTOCOL, MAPPER)["protocol"]
    assert default["halved_labels"] == ["mapillary_val"]
    chosen = SegmentationMapper(
        is_train=False,
        test_sizes={"cityscapes_val": (2048, 1024), "mapillary_val": None},
        native_labels=True,
    )
    protocol = summarize(results, ["camvid_day_train"], PROTOCOL, chosen)["protocol"]
    assert protocol["halved_labels"] == []
    assert protocol["test_size"]["cityscapes_val"] == [2048, 1024]
    assert protocol["test_size"]["mapillary_val"] is None


def test_a_summary_is_json_also_without_targets():
    summary = summarize(
        {"camvid_day_test": RESULTS["camvid_day_test"]}, ["camvid_day_train"], PROTOCOL, MAPPER
    )
    assert summary["target_average"] is None and summary["targets"] == {}
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert "average over unseen" in format_table(summary)


def test_the_table_shows_scores_and_gaps():
    text = format_table(summarize(RESULTS, ["camvid_day_train"], PROTOCOL, MAPPER))
    lines = {line.split("  ")[0].strip(): line.split() for line in text.splitlines() if line}
    assert lines["camvid_day_test"] == ["camvid_day_test", "source", "60.00"]
    assert lines["camvid_dusk_test"][1:] == ["unseen", "40.00"]
    assert lines["average over unseen"][-1] == "35.00"
    assert lines["sky"] == ["sky", "90.00", "50.00", "-"]
    assert lines["car"] == ["car", "-", "30.00", "-"]
    assert lines["road"][-1] == "80.00"
