import json

import pytest

from fishertune_d2.analysis.compare import compare


def _write(folder, method, **protocol):
    folder.mkdir()
    results = {
        "source": {"day": 61.234},
        "targets": {"dusk": 40.0, "night": 20.0},
        "target_average": 30.0,
        "tuned_parameters": 1_500_000,
        "protocol": {"method": method, "commit": "abc", "seed": 1, **protocol},
    }
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_a_row_for_each_run(tmp_path):
    text = compare([_write(tmp_path / "a", "full"), _write(tmp_path / "b", "freeze")])
    header, _, first, second, _, protocol = text.splitlines()
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    assert cells == ["full", "1.50 M", "61.23", "40.00", "20.00", "30.00", "abc"]
    assert second.split("|")[1].strip() == "freeze"
    assert "dusk" in header and protocol == "Protocol: seed 1"


def test_refuses_to_compare_unlike_runs(tmp_path):
    runs = [_write(tmp_path / "a", "full"), _write(tmp_path / "b", "freeze", seed=2)]
    with pytest.raises(ValueError, match="another protocol"):
        compare(runs)
