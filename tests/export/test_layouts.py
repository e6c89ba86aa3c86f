"""Plain files of every family's tiny model, read by timm and transformers themselves."""

import json
import os
import stat

import timm
import torch
from pytest import fixture, mark, raises
from transformers import AutoImageProcessor, AutoModel

from fishertune_d2.export import LAYOUTS, Architecture, TunedModel
from fishertune_d2.modeling.vfm import VFMS

IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


@fixture
def tuned(small):
    """Builds a tiny backbone, and the tuned model that it stands for."""

    def build(name, img_size=(64, 64)):
        backbone = small(name, patch_size=16, img_size=img_size)
        architecture = Architecture(name, VFMS[name].timm_name, img_size, 16, *IMAGENET)
        return backbone, TunedModel(architecture, backbone.vit.state_dict())

    return build


def assert_same(got, expected):
    torch.testing.assert_close(dict(got), dict(expected), rtol=0, atol=0)


def features(model, image):
    with torch.no_grad():
        return model.eval().forward_features(image)


def test_timm_reads_the_folder_by_the_code_of_the_card(small_family, tuned, tmp_path, run_card):
    backbone, model = tuned(small_family, (48, 80))
    LAYOUTS["timm"](model, tmp_path)
    model.card.write(tmp_path, model.architecture, "timm")
    got = run_card(tmp_path)["backbone"]
    assert_same(got.state_dict(), backbone.vit.state_dict())
    image = torch.randn(1, 3, 48, 80)
    assert torch.equal(features(got, image), features(backbone.vit, image))


@mark.parametrize("layout", ["timm", "transformers"])
def test_the_files_can_be_read_by_others(layout, tuned, tmp_path):
    before = os.umask(0o022)
    try:
        LAYOUTS[layout](tuned("dinov2_vitl")[1], tmp_path)
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) > 1 and set(modes.values()) == {0o644}, modes


def test_timms_file_alone_is_a_checkpoint(tuned, tmp_path):
    backbone, model = tuned("dinov2_vitl")
    LAYOUTS["timm"](model, tmp_path)
    arguments = json.loads((tmp_path / "config.json").read_text())["model_args"]
    got = timm.create_model(
        "vit_large_patch14_dinov2",
        num_classes=0,
        checkpoint_path=str(tmp_path / "model.safetensors"),
        **arguments,
    )
    assert_same(got.state_dict(), backbone.vit.state_dict())


def test_timms_config_normalises_as_the_run_did(tuned, tmp_path):
    LAYOUTS["timm"](tuned("clip_vitl")[1], tmp_path)
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    pixels = timm.data.resolve_model_data_config(model)
    torch.testing.assert_close(pixels["mean"], [0.485, 0.456, 0.406])  # not OpenAI's
    torch.testing.assert_close(pixels["std"], [0.229, 0.224, 0.225])


@mark.parametrize("name", ["dinov3_vitl", "clip_vitl", "eva02_clip_vitl"])
def test_transformers_reads_timms_folder(name, tuned, tmp_path):
    backbone, model = tuned(name)
    LAYOUTS["timm"](model, tmp_path)
    got = AutoModel.from_pretrained(tmp_path).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(got(image).last_hidden_state, features(backbone.vit, image))


@mark.parametrize("name", ["dinov2_vitl", "dinov2_vitg", "dinov2_vitl_reg"])
def test_transformers_reads_its_own_layout(name, tuned, small, tmp_path):
    backbone, model = tuned(name)
    LAYOUTS["transformers"](model, tmp_path)
    got, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert type(got).__name__.startswith("Dinov2")
    assert not any(info.values())  # nothing missing, unexpected or of another size
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            got.eval()(image).last_hidden_state, features(backbone.vit, image), rtol=1e-5, atol=1e-5
        )
    pixels = AutoImageProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(pixels.image_mean, [0.485, 0.456, 0.406])

    # And back: the file is one that MODEL.VFM.WEIGHTS takes.
    again = small(name, tmp_path / "model.safetensors", patch_size=16, img_size=(64, 64))
    assert_same(again.vit.state_dict(), backbone.vit.state_dict())


def test_what_transformers_cannot_hold_is_refused(tuned, tmp_path):
    with raises(ValueError, match="is for dinov2_vits, .*, not dinov3_vitl: write the layout timm"):
        LAYOUTS["transformers"](tuned("dinov3_vitl")[1], tmp_path / "out")
    with raises(
        ValueError, match=r"IMG_SIZE \(48, 80\) gives 3 x 5 patches: write the layout timm"
    ):
        LAYOUTS["transformers"](tuned("dinov2_vitl", (48, 80))[1], tmp_path / "out")
    with raises(ValueError, match="holds the backbone alone: write the delta with --decoder"):
        LAYOUTS["detectron2"](tuned("dinov2_vitl")[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
