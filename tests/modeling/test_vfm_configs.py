"""The configs of each foundation model: they read, and their headers say what is so."""

import re
from pathlib import Path

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_backbone
from pytest import mark

from fishertune_d2.config import add_fishertune_config
from fishertune_d2.engine.plan import count_parameters
from fishertune_d2.modeling.vfm import VFMS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
NAMES = {
    "dinov2": "dinov2_vitl",
    "dinov3": "dinov3_vitl",
    "clip": "clip_vitl",
    "mae": "mae_vitl",
    "mae_vith": "mae_vith",
    "sam": "sam_vith",
    "eva02": "eva02_vitl",
}
METHODS = ("fishertune", "full", "freeze")


def read(file: str) -> CfgNode:
    cfg = get_cfg()
    add_fishertune_config(cfg)
    cfg.merge_from_file(str(CONFIGS / file))
    return cfg


@mark.parametrize("method", METHODS)
@mark.parametrize("short", NAMES)
def test_headers_are_true(short, method):
    file = f"{method}_{short}.yaml"
    cfg, text = read(file), (CONFIGS / file).read_text()
    assert (cfg.MODEL.VFM.NAME, cfg.TUNING.METHOD) == (NAMES[short], method)
    assert cfg.OUTPUT_DIR == f"outputs/{method}_{short}"
    assert f"#   python train_net.py --config-file configs/{file} [--num-gpus N]\n" in text
    assert "# Expected result: not measured here yet." in text

    row = VFMS[NAMES[short]]
    if method == "fishertune":
        assert f"#   {row.source}\n" in text and f"licence: {row.licence})" in text
    else:
        assert f"# Needs: what fishertune_{short}.yaml needs;" in text

    cfg.MODEL.VFM.WEIGHTS = "random"
    with torch.device("meta"):
        counts = count_parameters(cfg, build_backbone(cfg))
    tuned, total = (n / 1e6 for n in (counts["tuned_parameters"], counts["backbone_parameters"]))
    stated = re.search(r"^# Tunes: (.*) backbone weights\.$", text, re.MULTILINE)[1]
    assert stated == f"{tuned:.2f} M of {total:.2f} M"


@mark.parametrize("method", METHODS)
@mark.parametrize("short", NAMES)
def test_configs_differ_in_model_and_method_alone(short, method):
    cfg, base = read(f"{method}_{short}.yaml"), read("Base-gtav.yaml")
    cfg.MODEL.VFM.NAME, cfg.TUNING.METHOD, cfg.OUTPUT_DIR = (
        base.MODEL.VFM.NAME,
        base.TUNING.METHOD,
        base.OUTPUT_DIR,
    )
    assert cfg == base
