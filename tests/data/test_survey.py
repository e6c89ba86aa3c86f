"""What ``python -m fishertune_d2.data.check`` finds, prints and returns."""

import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

import fishertune_d2
from fishertune_d2.data.check import check_datasets, pixel_counts
from fishertune_d2.data.check.__main__ import main
from fishertune_d2.data.check.survey import datasets_on_disk, format_surveys, survey
from fishertune_d2.data.dataset_description import Published
from fishertune_d2.data.dataset_table import DATASETS

BY_NAME = {dataset.name: dataset for dataset in DATASETS}
# Two labels with Cityscapes' ids: 12 pixels of road, 6 of car, 4 of sky, 2 ignored.
LABELS = (
    [[7, 7, 7, 7], [7, 7, 26, 26], [23, 23, 26, 0]],
    [[7, 7, 7, 7], [7, 7, 26, 26], [23, 23, 26, 1]],
)
PUBLISHED = Published(2, sizes=((4, 3),), shares={"road": 50.0, "car": 25.0})


@pytest.fixture
def gta(tmp_path, monkeypatch):
    """Points to a fake GTAV; returns a function that gives it other published numbers."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    for folder in ("images", "labels"):
        (tmp_path / "gta" / folder).mkdir(parents=True)
    for k, ids in enumerate(LABELS):
        Image.new("RGB", (4, 3)).save(tmp_path / f"gta/images/{k}.png")
        Image.fromarray(np.array(ids, dtype=np.uint8)).save(tmp_path / f"gta/labels/{k}.png")
    return lambda **kwargs: replace(BY_NAME["gtav_train"], published=replace(PUBLISHED, **kwargs))


def test_what_is_as_published_is_no_problem(gta):
    found = survey(gta())
    assert found.problems == []
    assert (found.pairs, dict(found.sizes)) == (2, {(4, 3): 2})
    assert found.ignored() == pytest.approx(100 * 2 / 24)
    shares = {name: share for name, share in found.shares().items() if share}
    assert shares == pytest.approx(
        {"road": 100 * 12 / 22, "car": 100 * 6 / 22, "sky": 100 * 4 / 22}
    )
    assert len(found.absent()) == 16 and "bus" in found.absent()


def test_a_quick_survey_counts_and_measures_without_reading(gta, tmp_path):
    file = tmp_path / "gta/labels/0.png"
    file.write_bytes(file.read_bytes()[:40])  # the header is whole
    found = survey(gta(pairs=3), pixels=False)
    (problem,) = found.problems
    assert (found.pairs, dict(found.sizes)) == (2, {(4, 3): 2}) and "3 are published" in problem
    assert not found.pixels.any() and not (tmp_path / "cache").exists()
    assert "bad files" in survey(gta()).problems[0]


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"pairs": 3}, "gtav_train: 2 pairs, 3 are published. Download"),
        ({"pairs": 1}, "gtav_train: 2 pairs, 1 are published. Remove the files"),
        ({"sizes": ((8, 6),)}, "2 pairs have 4x3 pixels, published are 8x6. Use the files at"),
        ({"absent": ()}, "never labelled is sidewalk, building, .*; published is no class. The"),
        (
            {"shares": {"car": 60.0}},
            "25.0 % of all pixels are car, known are 60.0 %. The label map",
        ),
    ],
)
def test_each_difference_is_a_problem_with_its_remedy(gta, published, message):
    (problem,) = survey(gta(**published)).problems
    assert re.search(message, problem)


def test_shares_within_a_quarter_pass(gta):
    assert not survey(gta(shares={"road": 40.1, "car": 33.0})).problems
    assert len(survey(gta(shares={"road": 39.9, "car": 34.0})).problems) == 2


def test_labels_converted_in_place_are_found_out(gta, tmp_path):
    for k in range(2):  # road and car as train ids, which are known ids of other classes
        Image.new("L", (4, 3), 13 * k).save(tmp_path / f"gta/labels/{k}.png")
    problems = survey(gta()).problems
    assert any("0.0 % of all pixels are road" in text for text in problems)
    assert all("were these labels converted?" in text for text in problems)


def test_classes_of_incomplete_data_are_not_judged(gta):
    (problem,) = survey(gta(pairs=3, absent=(), shares={"car": 60.0})).problems
    assert "3 are published" in problem


def test_bad_files_and_missing_folders_are_problems(gta, tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "gta/labels/1.png")
    found = survey(gta())
    (problem,) = found.problems
    assert "1 bad files" in problem and "label 200 is out of range" in problem
    assert found.pixels.sum() == 12  # the other label still counts
    (tmp_path / "gta/labels/1.png").unlink()
    assert "have no label" in survey(gta()).problems[0]
    assert "no folder" in survey(BY_NAME["cityscapes_val"]).problems[0]


def test_what_passed_is_not_read_again_before_training(gta, monkeypatch):
    survey(gta())
    monkeypatch.setattr(pixel_counts, "read_image", lambda path: pytest.fail("read again"))
    check_datasets(["gtav_train"])


def test_what_failed_is_read_again_before_training(gta, tmp_path):
    Image.new("L", (4, 3), 200).save(tmp_path / "gta/labels/1.png")
    survey(gta())
    with pytest.raises(fishertune_d2.data.DatasetError, match="label 200"):
        check_datasets(["gtav_train"])


def test_the_tables_hold_what_was_found(gta):
    text = format_surveys([survey(gta(pairs=3)), survey(BY_NAME["cityscapes_val"])])
    lines = {line.split()[0]: line.split() for line in text.splitlines() if line}
    assert lines["gtav_train"][1:6] == ["2", "3", "4x3", "8.3", "sidewalk,"]
    assert lines["cityscapes_val"][1:] == ["0", "500", "-", "-", "-"]
    assert lines["road"] == ["road", "54.545"] and lines["bus"] == ["bus", "0.000"]
    assert text.count("Problem: ") == 2


def test_classes_that_a_map_cannot_reach_are_not_missed(camvid_tree):
    camvid_tree()  # its labels hold all 12 ids
    found = survey(BY_NAME["camvid_day_train"])
    assert len(found.shares()) == 11 and found.absent() == []
    bus = next(x for x in format_surveys([found]).splitlines() if x.startswith("bus"))
    assert bus.split() == ["bus", "-"]


def test_many_data_sets_share_several_tables(gta):
    text = format_surveys([survey(gta()) for _ in range(7)])
    heads = [line for line in text.splitlines() if line.startswith("% of labelled pixels")]
    assert [head.count("gtav_train") for head in heads] == [5, 2]


def test_published_classes_are_classes():
    for dataset in DATASETS:
        assert dataset.published is not None, dataset.name
        named = {*(dataset.published.absent or ()), *dataset.published.shares}
        assert named <= set(dataset.classes), dataset.name
        assert sum(dataset.published.shares.values()) < 100


def test_the_command_returns_1_for_a_problem(gta, capsys):
    assert main(["gtav_train", "gtav_train"]) == 1
    out = capsys.readouterr().out
    assert out.count("2 pairs, 24904 are published") == 1


def test_the_command_returns_0_where_all_is_well(gta, monkeypatch, capsys):
    monkeypatch.setattr("fishertune_d2.data.check.survey.DATASETS", [gta()])
    assert main(["--all"]) == 0
    assert "No problem found." in capsys.readouterr().out


def test_all_means_what_is_there(gta, tmp_path):
    for folder in ("rgb_anon/val", "gt/val", "rgb_anon/fog/train"):  # labels of train are missing
        (tmp_path / "acdc" / folder).mkdir(parents=True)
    names = [dataset.name for dataset in datasets_on_disk()]
    conditions = ("fog", "night", "rain", "snow")
    assert names == ["gtav_train", "acdc_val", *(f"acdc_{c}_val" for c in conditions)]
    assert not (tmp_path / "streets").exists()  # nothing was drawn


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cityscape_val"], "no data set 'cityscape_val'; choose from gtav_train"),
        ([], "name a data set, or use --all"),
        (["--all"], "set DETECTRON2_DATASETS"),
    ],
)
def test_the_command_explains_what_it_cannot_do(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    assert message in capsys.readouterr().err


def test_the_command_runs_as_a_module(fresh_process):
    assert fresh_process.returncode == 1
    assert "Problem: gtav_train: 1 pairs" in fresh_process.stdout
    assert "RuntimeWarning" not in fresh_process.stderr  # of a module that its package imported


def test_warnings_are_printed_and_are_no_problem(gta, tmp_path, monkeypatch, capsys):
    """Masks of 0 and 1 whose 1 became 255, and the classes that they therefore lack."""
    for k in range(2):
        ids = np.zeros((3, 4), dtype=np.uint8)
        ids[0] = 255
        Image.fromarray(ids).save(tmp_path / f"gta/labels/{k}.png")
    dataset = replace(gta(shares={}), label_map="identity_19")
    monkeypatch.setattr("fishertune_d2.data.check.__main__.DATASETS", [dataset])
    assert main(["gtav_train"]) == 0
    out = capsys.readouterr().out
    assert "No problem found." in out
    assert "Warning: gtav_train: none of its labels holds sidewalk" in out
    assert "these look like 0/1 masks that were scaled to 255" in out


def test_warnings_do_not_hide_a_problem(gta):
    found = survey(gta(absent=()))
    assert found.problems and not found.warnings
