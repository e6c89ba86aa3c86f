"""MODEL_ZOO.md is what its command writes, and the command reads what runs wrote."""

import json
from pathlib import Path
from runpy import run_path

import pytest

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs/results"
TOOL = run_path(str(ROOT / "tools/model_zoo.py"))


def _write(results: Path, place: str, **protocol) -> None:
    """A run's results, with a protocol that differs in ``protocol`` from a usual one."""
    protocol = {
        "mode": "whole",
        "method": "fishertune",
        "seed": 7,
        "iterations": 600,
        "warmup_iterations": 200,
        "commit": "abc",
    } | protocol
    content = {
        "source": {"camvid_day_test": 51.234},
        "targets": {"camvid_dusk_test": 40.0},
        "tuned_parameters": 1_082_284,
        "protocol": protocol,
    }
    (results / place).mkdir(parents=True)
    (results / place / "results.json").write_text(json.dumps(content))


def _tables(page: str) -> list[list[list[str]]]:
    """The cells of each section's table, without its heading."""
    return [
        [
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in text.splitlines()
            if line.startswith("|")
        ][2:]
        for text in page.split("\n## ")[1:]
    ]


def test_the_page_is_what_the_command_writes():
    page = TOOL["page"](RESULTS)
    assert (ROOT / "MODEL_ZOO.md").read_text() == page, "run python tools/model_zoo.py"
    files = list(RESULTS.rglob("results.json"))
    assert files and sum(map(len, _tables(page))) == len(files)


def test_a_line_says_what_was_run_and_what_came_of_it(tmp_path):
    _write(tmp_path, "table4/dinov2_vits/share_20_7/test")
    _write(tmp_path, "table4/dinov2_vits/freeze_7/test", vfm="dinov2_vits", method="freeze")
    page = TOOL["page"](tmp_path)
    (lines,) = _tables(page)
    config = "[{0}.yaml](configs/camvid/{0}.yaml)"
    scores = ["51.23", "40.00"]
    assert lines == [
        ["freeze", "7", "200 + 400", "1.08 M", *scores, config.format("freeze"), "abc"],
        ["share_20", "7", "200 + 400", "1.08 M", *scores, config.format("fishertune"), "abc"],
    ]
    assert "`dinov2_vits`, trained on camvid_day_train; mode whole." in page
    assert "bench table4 --profile camvid --methods ROW" in page
    assert "No ViT-L" in page and "to choose on" not in page


def test_other_protocols_models_and_data_have_tables_of_their_own(tmp_path):
    _write(tmp_path, "table4/freeze_7")
    _write(tmp_path, "table4/full_7", mode="slide")
    _write(tmp_path, "table4/random_7", train=["streets_day_train"])
    _write(tmp_path, "elsewhere/full_7", vfm="dinov2_vitl", train=["gtav_train"])
    page = TOOL["page"](tmp_path)
    assert sorted(lines[0][0] for lines in _tables(page)) == ["freeze", "full", "full", "random"]
    assert "--profile streets" in page
    assert "`dinov2_vitl`, trained on gtav_train" in page
    assert "No ViT-L" not in page


@pytest.mark.parametrize("place", ["selection/fishertune", "fishertune_7", "selection/full_8"])
def test_a_folder_that_does_not_say_what_it_holds_is_refused(tmp_path, place):
    _write(tmp_path, place)
    with pytest.raises(ValueError, match=r"lay it into .*/<table>/<row>_7/"):
        TOOL["page"](tmp_path)
