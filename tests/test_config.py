from pathlib import Path

import pytest
from yaml.constructor import ConstructorError

import fishertune_d2
from fishertune_d2.config import CONFIGS, find_config, read_config

ROOT = Path(__file__).resolve().parents[1]


def test_a_config_is_found_by_its_name():
    assert fishertune_d2.get_config_file("demo.yaml") == str(ROOT / "configs/demo.yaml")
    assert read_config("camvid/freeze.yaml").TUNING.METHOD == "freeze"


def test_a_file_of_ones_own_goes_before_a_config_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo.yaml").write_text("SEED: 7\n")
    assert find_config("demo.yaml") == "demo.yaml" and read_config("demo.yaml").SEED == 7
    assert fishertune_d2.get_config_file("demo.yaml") == str(CONFIGS / "demo.yaml")


@pytest.mark.parametrize("name", ["none.yaml", "camvid", ""])
def test_what_is_no_config_is_refused_with_where_they_lie(name):
    for find in (fishertune_d2.get_config_file, find_config):
        with pytest.raises(FileNotFoundError, match=f"'{name}'.*they lie in {CONFIGS}"):
            find(name)


def test_a_config_runs_no_code(tmp_path):
    file = tmp_path / "hostile.yaml"
    file.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{tmp_path}/made"]\n')
    with pytest.raises(ConstructorError, match="python/object"):
        read_config(str(file))
    assert not (tmp_path / "made").exists()
