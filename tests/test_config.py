from pathlib import Path

import pytest
import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.engine import DefaultTrainer

import fishertune_d2
from fishertune_d2.config import (
    CONFIGS,
    RECIPE,
    add_fishertune_config,
    default_config,
    find_config,
    read_config,
)
from fishertune_d2.config_slips import ConfigError

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


def test_a_config_that_is_not_there_names_the_nearest(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nearest: fishertune_dinov2\.yaml, "):
        find_config("configs/fishertune_dino.yaml")
    with pytest.raises(FileNotFoundError, match=f"is a folder: .* {tmp_path}/config.yaml"):
        find_config(str(tmp_path))


def test_a_config_runs_no_code(tmp_path):
    file = tmp_path / "hostile.yaml"
    file.write_text(f'OUTPUT_DIR: !!python/object/apply:os.mkdir ["{tmp_path}/made"]\n')
    with pytest.raises(
        ConfigError, match=r"hostile.yaml is no YAML that can be read: line 1: .*run"
    ):
        read_config(str(file))
    assert not (tmp_path / "made").exists()


def _values(node: CfgNode, prefix: str = "") -> dict:
    values = {}
    for name, value in node.items():
        inner = isinstance(value, CfgNode)
        values |= _values(value, f"{prefix}{name}.") if inner else {prefix + name: value}
    return values


def test_adding_the_keys_leaves_detectron2s_values_alone():
    cfg = get_cfg()
    before = _values(cfg)
    add_fishertune_config(cfg)
    after = _values(cfg)
    assert {key: after[key] for key in before} == before
    # A stock trainer of the same config builds its optimizer and schedule as without us.
    model = torch.nn.Linear(1, 1)
    optimizer = DefaultTrainer.build_optimizer(cfg, model)
    assert DefaultTrainer.build_lr_scheduler(cfg, optimizer) is not None


@pytest.mark.parametrize("file", [p.name for p in sorted(CONFIGS.glob("*.yaml"))])
def test_detectron2_reads_a_shipped_config_as_the_command_does(file):
    cfg = get_cfg()
    add_fishertune_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file))
    assert cfg == read_config(file)


def test_a_config_without_base_starts_from_the_recipe(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("SOLVER: {BASE_LR: 0.5}\n")
    expected = default_config()
    expected.SOLVER.BASE_LR = 0.5
    assert read_config(str(file)) == expected
    assert default_config() == read_config(RECIPE)
