"""A ConvNeXt as the VFM of the real trainer: methods, plan, export and evaluation."""

import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.export import delta_of_run, tuned_backbone
from fishertune_d2.export.__main__ import main as export
from fishertune_d2.fisher import Selection
from fishertune_d2.plan import make_plan, summary
from fishertune_d2.report import Run, write_report

from .conftest import final_state, train

CONV = {
    "MODEL__VFM__NAME": "tiny_convnext",
    "DATASETS__TEST": (),
    "SOLVER__CHECKPOINT_PERIOD": 100,
    "INPUT__CROP__SIZE": [64, 64],
}
BY_LAYER = {"TUNING__UNIT": "neuron", "TUNING__ALLOCATION": "layer", "TUNING__D_MAX": 0.2}
METHODS = {
    "freeze": {},
    "full": {},
    "fishertune": {},
    "fishertune by neurons": BY_LAYER,
    "childtune": {},
    "random": {},
    "fisher": {"TUNING__FEATURE_PERTURBATION": True},
}


def _backbone(folder: str) -> dict[str, torch.Tensor]:
    state = final_state(folder)["model"]
    return {name: t for name, t in state.items() if name.startswith("backbone.")}


@pytest.mark.parametrize("name", METHODS)
def test_methods_train_what_they_say(tiny_cfg, name):
    method = name.split()[0]
    cfg = tiny_cfg(**CONV, **METHODS[name], TUNING__METHOD=method)
    trainer = train(cfg)
    out = Path(cfg.OUTPUT_DIR)
    start = torch.load(out / "model_warmup.pth", weights_only=True)["model"]
    end = _backbone(cfg.OUTPUT_DIR)
    moved = {name for name, tensor in end.items() if not torch.equal(tensor, start[name])}
    pointwise = {name for name in end if ".mlp.fc" in name}
    if method == "freeze":
        assert not moved
    elif method == "full":
        assert len(moved) > 0.9 * len(end) and moved - pointwise
    else:
        assert moved and moved <= pointwise
        selection = Selection.load(out / "selection.safetensors")
        assert {block for _, block in selection.group_sizes()} == set(range(9))
        if method == "fishertune" and name != method:  # the same share of each block's neurons
            chosen = selection.summary()
            assert all(count > 0 for count in chosen.values())
    assert trainer.backbone.output_shape()["res5"].channels == 64
    assert "tuning" in summary(make_plan(cfg))


def test_a_run_is_exported_reported_and_built_again(tiny_cfg, tmp_path, run_card):
    torch.manual_seed(1)
    public = timm.create_model("test_convnext", num_classes=0).state_dict()
    save_file(public, tmp_path / "public.safetensors")
    cfg = tiny_cfg(**CONV, MODEL__VFM__WEIGHTS=str(tmp_path / "public.safetensors"))
    trainer = train(cfg)
    (Path(cfg.OUTPUT_DIR) / "config.yaml").write_text(cfg.dump())
    delta = delta_of_run(cfg.OUTPUT_DIR)
    assert delta.architecture.patch_size == 32  # the stride of the last stage
    assert 0 < delta.changed <= 0.05 * sum(t.numel() for t in public.values())
    exported = tuned_backbone(delta, str(tmp_path / "public.safetensors")).vit.state_dict()
    trained = trainer.backbone.vit.state_dict()
    assert all(torch.equal(exported[name], tensor.cpu()) for name, tensor in trained.items())
    model = build_trained(cfg, str(Path(cfg.OUTPUT_DIR) / "model_final.pth"))
    assert not model.untrained
    export(["plain", cfg.OUTPUT_DIR, "--output", str(tmp_path / "timm")])
    got = run_card(tmp_path / "timm")["backbone"]
    # MODEL.VFM.IMG_SIZE, which a ConvNeXt does not read, is no fact of it.
    assert "image size" not in (tmp_path / "timm/README.md").read_text()
    config = json.loads((tmp_path / "timm/config.json").read_text())
    assert "input_size" not in config["pretrained_cfg"]
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = trainer.backbone.vit.cpu().forward_features(image)
        assert torch.equal(got.eval().forward_features(image), expected)
    write_report(Run(Path(cfg.OUTPUT_DIR)), tmp_path / "report.html")
    assert "<img" in (tmp_path / "report.html").read_text()
