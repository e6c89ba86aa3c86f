"""The configs of the paper's Tables 1 to 4: complete, on the right data, with correct heads."""

import re
from ast import literal_eval
from pathlib import Path

import pytest
from detectron2.config import CfgNode
from documents import commands_of_head

from fishertune_d2.bench.tables import TABLES
from fishertune_d2.config import CONFIGS, read_config
from fishertune_d2.data.dataset_table import DATASETS

METHODS = ("fishertune", "full", "freeze")
VFMS = {"dinov2": "dinov2_vitl", "eva02": "eva02_vitl"}
# Folder of configs: the data sets to train on and to test on.
PROTOCOLS = {
    ".": (("gtav_train",), ("cityscapes_val", "bdd100k_val", "mapillary_val")),
    "cityscapes": (("cityscapes_train",), ("cityscapes_val", "bdd100k_val", "acdc_val")),
}
CASES = [(folder, vfm, method) for folder in PROTOCOLS for vfm in VFMS for method in METHODS]


def path_of(folder: str, vfm: str, method: str) -> Path:
    return CONFIGS / folder / f"{method}_{vfm}.yaml"


def read(path: Path) -> CfgNode:
    return read_config(str(path))


# Full fine-tuning has a tenth of the others' rate.
FULL_RATE = {"SOLVER.BACKBONE_MULTIPLIER"}


def differing(one: CfgNode, other: CfgNode, above: str = "") -> set[str]:
    """The keys, as "MODEL.VFM.NAME", in which two configs differ."""
    keys = set()
    for key, value in one.items():
        if isinstance(value, CfgNode):
            keys |= differing(value, other[key], f"{above}{key}.")
        elif value != other[key]:
            keys.add(above + key)
    return keys


def test_the_cityscapes_folder_holds_one_config_for_each_model():
    models = {path_of(*case) for case in CASES if case[0] == "cityscapes"}
    folder = CONFIGS / "cityscapes"
    assert set(folder.iterdir()) == {folder / "Base-cityscapes.yaml", *models}


@pytest.mark.parametrize(("folder", "vfm", "method"), CASES)
def test_data_model_and_method(folder, vfm, method):
    cfg = read(path_of(folder, vfm, method))
    train, test = PROTOCOLS[folder]
    assert (cfg.DATASETS.TRAIN, cfg.DATASETS.TEST) == (train, test)
    assert {*train, *test} <= {data_set.name for data_set in DATASETS}
    assert (cfg.MODEL.VFM.NAME, cfg.TUNING.METHOD) == (VFMS[vfm], method)
    assert Path(cfg.OUTPUT_DIR) == Path("outputs", folder, f"{method}_{vfm}")
    # All tables share Rein's recipe for crops of 512 x 512.
    free = {"DATASETS.TRAIN", "DATASETS.TEST", "MODEL.VFM.NAME", "TUNING.METHOD", "OUTPUT_DIR"}
    free |= {"TEST.PROTOCOL"}
    free |= FULL_RATE if method == "full" else set()
    assert differing(cfg, read(CONFIGS / "Base-paper.yaml")) <= free
    assert cfg.TEST.PROTOCOL == ("rein" if folder == "." else "")
    assert (cfg.INPUT.CROP.SIZE, cfg.TEST.CROP_SIZE) == ([512, 512], [512, 512])


@pytest.mark.parametrize(("folder", "vfm", "method"), CASES)
def test_methods_of_one_model_differ_in_method_and_folder_alone(folder, vfm, method):
    cfg, first = (read(path_of(folder, vfm, name)) for name in (method, "fishertune"))
    expected = set() if method == "fishertune" else {"TUNING.METHOD", "OUTPUT_DIR"}
    expected |= FULL_RATE if method == "full" else set()
    assert differing(cfg, first) == expected


def test_the_configs_from_cityscapes_test_what_the_papers_tables_test():
    assert TABLES["table3"].source == TABLES["table2"].source == "cityscapes/"
    for table in ("table2", "table4", "fig3", "fig5"):
        assert TABLES[table].test == PROTOCOLS["cityscapes"][1]
    head = commands_of_head(Path("configs/cityscapes/Base-cityscapes.yaml"))
    (command,) = [c.words for c in head if "--eval-only" in c.words]
    assert literal_eval(command[command.index("DATASETS.TEST") + 1]) == TABLES["table3"].test
    config, weights = command[3], command[command.index("MODEL.WEIGHTS") + 1]
    assert weights == f"{read(Path(config)).OUTPUT_DIR}/model_final.pth"


@pytest.mark.parametrize(
    ("folder", "vfm", "method"), [case for case in CASES if case[0] == "cityscapes"]
)
def test_heads_say_what_the_same_model_from_gtav_costs(folder, vfm, method):
    path, from_gtav = path_of(folder, vfm, method), path_of(".", vfm, method)
    text = path.read_text()
    assert f"#   python train_net.py --config-file configs/{folder}/{path.name} [" in text
    assert "here yet. The paper reports " in " ".join(text.split("\n# "))
    needed = f"configs/{path.name}" if method == "fishertune" else f"fishertune_{vfm}.yaml"
    assert needed in text[text.index("# Needs: ") : text.index("# Tunes: ")]
    # tests/modeling/test_vfm_configs.py and tests/plan hold the numbers of those to the models.
    tunes_and_costs = re.compile(r"^# Tunes: .*?(?=^# Expected)", re.M | re.S)
    assert tunes_and_costs.findall(text) == tunes_and_costs.findall(from_gtav.read_text()) != []


def test_no_two_configs_write_into_one_folder():
    folders = [
        read(path).OUTPUT_DIR
        for path in CONFIGS.rglob("*.yaml")
        if not path.name.startswith("Base-")
    ]
    assert len(set(folders)) == len(folders)
