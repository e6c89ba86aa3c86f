"""MODEL_ZOO.md is the page that its command writes, with a mean over seeds for each method."""

from pathlib import Path
from runpy import run_path

import pytest

from fishertune_d2.analysis.study import StudyRun, save_runs

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
TOOL = run_path(str(ROOT / "tools/model_zoo.py"))


def _save(results: Path, study: str, path: str, score: float = 51.234, **protocol) -> None:
    """Adds a run of this name, ``<vfm>/<entry>@rate=<rate>_<seed>/test``, to a study's table."""
    vfm, folder, *_ = path.split("/")
    entry, _, seed = folder.rpartition("_")
    entry, _, rate = entry.partition("@rate=")
    facts = {"mode": "whole", "method": entry, "seed": int(seed), "commit": "abc"}
    lengths = {"iterations": 600, "warmup_iterations": 200}
    sets = ("camvid_day_test", "camvid_dusk_test")
    content = {
        "source": {sets[0]: score},
        "targets": {sets[1]: 40.0},
        "target_average": 40.0,
        "per_class": {name: {} for name in sets},
        "tuned_parameters": 1_082_284,
        "backbone_parameters": 21_645_696,
        "protocol": facts | lengths | {"classes": {name: [] for name in sets}} | protocol,
    }
    train = tuple(protocol.get("train", ("camvid_day_train",)))
    number = float(rate) if rate else None
    run = StudyRun(path, entry, vfm, train, int(seed), number, None, None, content)
    save_runs(results / f"{study}.jsonl", [run])


def _tables(page: str) -> list[list[list[str]]]:
    """The lines of each section's table, split into their entries."""
    return [
        [
            [entry.strip() for entry in line.strip("|").split("|")]
            for line in text.splitlines()
            if line.startswith("|")
        ][2:]
        for text in page.split("\n## ")[1:]
    ]


def test_the_page_is_what_the_command_writes():
    page = TOOL["page"](RESULTS)
    assert (ROOT / "MODEL_ZOO.md").read_text() == page, "run python tools/model_zoo.py"
    assert len(page.splitlines()) < 200  # a line for each model
    assert {table.stem for table in RESULTS.glob("*.jsonl")} == TOOL["STUDIES"].keys()


def test_a_line_has_the_mean_over_the_seeds_of_a_method_in_a_setting(tmp_path):
    for seed, score in ((7, 50.0), (8, 52.0)):
        _save(tmp_path, "selection", f"dinov2_vits/share_20_{seed}/test", score)
    _save(tmp_path, "selection", "dinov2_vits/freeze_7/test")
    (lines,) = _tables(TOOL["page"](tmp_path))
    link = "[Which weights to select](docs/results/selection.md)"
    start, end = [link, "-", "200 + 400"], ["1.08 M"]
    assert [[line[0], *line[2:4]] for line in lines] == [start, start]
    assert [line[1] for line in lines] == ["freeze", "share_20"]
    assert lines[0][4:] == ["1", *end, "51.23", "40.00"]
    assert lines[1][4:] == ["2", *end, "51.00 ± 1.41", "40.00 ± 0.00"]


def test_the_rates_and_the_seed_of_a_search_are_left_out(tmp_path):
    for rate, score in (("0.3", 10.0), ("1", 99.0), ("3", 20.0)):
        _save(tmp_path, "share_20", f"dinov2_vits/full@rate={rate}_42", score)
        _save(tmp_path, "share_20", f"dinov2_vits/lora@rate={rate}_42", score)
    _save(tmp_path, "share_20", "dinov2_vits/freeze_42")
    _save(tmp_path, "share_20", "dinov2_vits/full@rate=1_43", 30.0)
    (lines,) = _tables(TOOL["page"](tmp_path))
    assert [(line[1], line[2], line[4], line[6]) for line in lines] == [
        ("freeze", "-", "1", "51.23"),
        ("full", "1", "1", "30.00"),  # the seed with which nothing was chosen
        ("lora", "1", "1", "99.00"),  # the chosen rate, as there is no other seed
    ]


def test_other_models_and_data_have_tables_of_their_own(tmp_path):
    _save(tmp_path, "selection", "dinov2_vits/freeze_7")
    assert "No ViT-L" in TOOL["page"](tmp_path)
    _save(tmp_path, "table1_streets", "dinov2_vits/random_7", train=["streets_day_train"])
    _save(tmp_path, "table1_camvid", "dinov2_vitl/full_7", train=["gtav_train"])
    page = TOOL["page"](tmp_path)
    assert sorted(lines[0][1] for lines in _tables(page)) == ["freeze", "full", "random"]
    assert "`dinov2_vitl`, trained on gtav_train" in page and "No ViT-L" not in page


def test_other_protocols_are_refused(tmp_path):
    _save(tmp_path, "selection", "dinov2_vits/freeze_7")
    _save(tmp_path, "selection", "dinov2_vits/full_7", mode="slide")
    with pytest.raises(ValueError, match="differ in mode"):
        TOOL["page"](tmp_path)


def test_a_section_names_its_protocol(tmp_path):
    _save(tmp_path, "selection", "dinov2_vits/freeze_7", name="rein")
    _save(tmp_path, "selection", "dinov2_vits/full_7", name="tqdm")
    rein, tqdm = TOOL["page"](tmp_path).split("\n## ")[1:]
    assert "\n\nProtocol: `rein`.\n\n|" in rein and "freeze" in rein and "full" not in rein
    assert "\n\nProtocol: `tqdm`.\n\n|" in tqdm and "full" in tqdm


def test_a_study_without_a_title_is_refused(tmp_path):
    _save(tmp_path, "elsewhere", "dinov2_vits/freeze_7")
    with pytest.raises(ValueError, match="elsewhere.jsonl: add a title and a page to STUDIES"):
        TOOL["page"](tmp_path)
