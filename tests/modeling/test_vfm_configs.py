"""The configs of each foundation model: they read, and their headers say what is so."""

import re
from pathlib import Path

import torch
from detectron2.config import CfgNode
from pytest import approx, mark

from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.parameter_counts import count_parameters
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
    cfg = default_config()
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
    assert "# Expected result: neither time nor score is measured here yet." in text

    row = VFMS[NAMES[short]]
    if method == "fishertune":
        assert f"#   {row.source}\n" in text and f"licence: {row.licence})" in text
    else:
        assert f"# Needs: what fishertune_{short}.yaml needs;" in text

    assert _stated_tuned(text) == _tuned(cfg)


def _stated_tuned(text: str) -> str:
    return re.search(r"^# Tunes: (.*) backbone weights\.$", text, re.MULTILINE)[1]


def _tuned(cfg: CfgNode) -> str:
    counts = count_parameters(cfg)
    tuned, total = (counts[f"{key}_parameters"] / 1e6 for key in ("tuned", "backbone"))
    return f"{tuned:.2f} M of {total:.2f} M"


@mark.parametrize("method", METHODS)
@mark.parametrize("short", NAMES)
def test_configs_differ_in_model_and_method_alone(short, method):
    cfg, base = read(f"{method}_{short}.yaml"), read("Base-gtav.yaml")
    cfg.MODEL.VFM.NAME, cfg.TUNING.METHOD, cfg.OUTPUT_DIR = (
        base.MODEL.VFM.NAME,
        base.TUNING.METHOD,
        base.OUTPUT_DIR,
    )
    # 1e-5 for a whole backbone, 1e-4 for selected or added weights: see Base-paper.yaml.
    assert cfg.SOLVER.BASE_LR * cfg.SOLVER.BACKBONE_MULTIPLIER == approx(
        1e-5 if method == "full" else 1e-4
    )
    cfg.SOLVER.BACKBONE_MULTIPLIER = base.SOLVER.BACKBONE_MULTIPLIER
    assert cfg == base


def test_vltseg_has_its_own_recipe():
    file = "vltseg_eva02_clip.yaml"
    cfg, text = read(file), (CONFIGS / file).read_text()
    assert (cfg.MODEL.VFM.NAME, cfg.TUNING.METHOD) == ("eva02_clip_vitl", "full")
    row = VFMS["eva02_clip_vitl"]
    assert f"#   {row.source}\n" in text and f"licence: {row.licence})" in text
    assert _stated_tuned(text) == _tuned(cfg)
    # 5 k iterations of 16 images at 1e-4, a tenth for the backbone, which is tuned from the start.
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, cfg.TUNING.WARMUP_ITERS) == (5000, 16, 0)
    assert (solver.BASE_LR, solver.BACKBONE_MULTIPLIER, solver.WEIGHT_DECAY) == (1e-4, 0.1, 0.05)
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.01)
    assert (cfg.MODEL.VFM.PATCH_SIZE, cfg.TEST.STRIDE) == (row.patch_size, [426, 426])
    # What it is compared on is the same.
    base = read("Base-gtav.yaml")
    assert (cfg.DATASETS, cfg.INPUT, cfg.MODEL.SEM_SEG_HEAD, cfg.MODEL.MASK_FORMER) == (
        base.DATASETS,
        base.INPUT,
        base.MODEL.SEM_SEG_HEAD,
        base.MODEL.MASK_FORMER,
    )


TEXT = ("tqdm_eva02_clip", "fishertune_text_eva02_clip", "freeze_text_eva02_clip")


@mark.parametrize("name", TEXT)
def test_configs_with_text_queries_differ_in_the_method_alone(name):
    cfg, text = read(f"{name}.yaml"), (CONFIGS / f"{name}.yaml").read_text()
    assert f"#   python train_net.py --config-file configs/{name}.yaml [--num-gpus N]\n" in text
    assert _stated_tuned(text) == _tuned(cfg)
    own = read(f"{TEXT[0]}.yaml")
    solver, crop = own.SOLVER, own.INPUT.CROP.SIZE
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.WARMUP_ITERS) == (20000, 8, 1500)
    assert (solver.BASE_LR, solver.BACKBONE_MULTIPLIER, solver.WEIGHT_DECAY) == (1e-5, 0.1, 1e-4)
    assert (own.TEST.PROTOCOL, crop, own.TEST.STRIDE) == ("tqdm", [512, 512], [341, 341])
    row = VFMS[own.MODEL.VFM.NAME]
    assert f"#   {row.source}\n" in (CONFIGS / f"{TEXT[0]}.yaml").read_text()
    assert (own.MODEL.TEXT.NAME, own.TUNING.METHOD) == (own.MODEL.VFM.NAME, "full")
    assert cfg.OUTPUT_DIR == f"outputs/{name}"
    assert cfg.TUNING.METHOD in ("full", name.partition("_")[0])
    for key in ("METHOD", "WARMUP_ITERS"):
        own.TUNING[key] = cfg.TUNING[key]
    own.SOLVER.BACKBONE_MULTIPLIER, own.OUTPUT_DIR = cfg.SOLVER.BACKBONE_MULTIPLIER, cfg.OUTPUT_DIR
    if cfg.TUNING.METHOD == "freeze":  # a frozen tower needs no second one to stay near
        own.MODEL.TEXT.VISION_WEIGHT = 0.0
        own.MODEL.VFM.OUT_FEATURES = own.MODEL.VFM.OUT_FEATURES[:-1]
    assert cfg == own


@mark.parametrize("name", ["clouds_convnext", "clouds_convnext_self_training"])
def test_clouds_has_its_authors_recipe(name):
    cfg, text = read(f"{name}.yaml"), (CONFIGS / f"{name}.yaml").read_text()
    assert _stated_tuned(text) == _tuned(cfg)
    solver, clip, crop = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS, cfg.INPUT.CROP
    assert (solver.MAX_ITER, solver.IMS_PER_BATCH, solver.WEIGHT_DECAY) == (40000, 8, 0.05)
    assert (clip.ENABLED, clip.CLIP_TYPE, clip.CLIP_VALUE) == (True, "full_model", 0.01)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], solver.BASE_LR)
    schedule = Trainer.build_lr_scheduler(cfg, optimizer)
    schedule.last_epoch = 39999
    assert schedule.get_lr() == [1e-5]
    # 0.5 to 2 times 1052 x 1914; any crop of it
    assert (cfg.INPUT.MIN_SIZE_TRAIN[0], cfg.INPUT.MIN_SIZE_TRAIN[-1]) == (526, 2104)
    assert (crop.SIZE, crop.SINGLE_CATEGORY_MAX_AREA) == ([768, 768], 1.0)
    assert (cfg.TEST.MODE, cfg.TEST.PROTOCOL) == ("whole", "rein")
