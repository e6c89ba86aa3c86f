"""Files as transformers writes them: the reference is transformers itself, file and features."""

import logging

import torch
from pytest import fixture, mark, raises
from safetensors.torch import load_file
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    SamConfig,
    SamModel,
    SamVisionConfig,
    SamVisionModel,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTMAEModel,
)

from fishertune_d2.modeling import public_weights

SIZES = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 2}


def build(model, config):
    """A model all of whose numbers are random and none equal."""
    torch.manual_seed(0)
    built = model(config).eval()
    for parameter in built.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return built


def dinov3(gated):
    return build(
        DINOv3ViTModel,
        DINOv3ViTConfig(
            **SIZES,
            intermediate_size=256,
            image_size=64,
            patch_size=16,
            num_register_tokens=4,
            use_gated_mlp=gated,
            hidden_act="silu" if gated else "gelu",
        ),
    )


def without_biases(model):
    """Those of query and value are zero in all files that Meta publishes."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.bias", "v_proj.bias")):
            parameter.data.zero_()
    return model


CLIP_VISION = {**SIZES, "intermediate_size": 256, "image_size": 70, "patch_size": 14}


def clip_vision():
    return build(CLIPVisionModel, CLIPVisionConfig(**CLIP_VISION, hidden_act="quick_gelu"))


def clip():
    text = {**SIZES, "num_hidden_layers": 1, "intermediate_size": 64, "vocab_size": 32}
    vision = {**CLIP_VISION, "hidden_act": "quick_gelu"}
    return build(CLIPModel, CLIPConfig(text_config=text, vision_config=vision))


def mae_config():
    return ViTMAEConfig(
        **SIZES,
        intermediate_size=256,
        image_size=70,
        patch_size=14,
        layer_norm_eps=1e-6,
        mask_ratio=0.0,
        decoder_num_hidden_layers=1,
        decoder_hidden_size=32,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
    )


def sam_vision_config():
    return SamVisionConfig(
        **SIZES,
        image_size=128,
        patch_size=16,
        window_size=3,
        global_attn_indexes=[2, 5],
        mlp_dim=256,
        output_channels=32,
    )


def hidden(model, image, prefix):
    """(B, N, D) after each block, of the patches alone; what an encoder of transformers gives."""
    encoder = getattr(model, "vision_model", getattr(model, "vit", model))
    with torch.no_grad():
        if isinstance(model, ViTMAEModel | ViTMAEForPreTraining):
            # Its patches are shuffled even where none is masked; this noise keeps their order.
            patches = encoder.embeddings.patch_embeddings.num_patches
            states = encoder(image, noise=torch.arange(patches)[None], output_hidden_states=True)
        else:
            states = encoder(image, output_hidden_states=True)
    return [state[:, prefix:] for state in states.hidden_states[1:]]


def assert_same_features(got, model, image):
    with torch.no_grad():
        maps = got.vit.forward_intermediates(
            image, indices=got.taps, norm=False, intermediates_only=True
        )
    states = hidden(model, image, got.num_prefix_tokens)
    for tap, features in zip(got.taps[:-1], maps, strict=False):  # some norm the last one
        torch.testing.assert_close(features.flatten(2).mT, states[tap], rtol=1e-4, atol=1e-4)


MODELS = {
    "DINOv3": ("dinov3_vitl", lambda: without_biases(dinov3(False))),
    "DINOv3 with SwiGLU": ("dinov3_vith_plus", lambda: without_biases(dinov3(True))),
    "CLIP's encoder": ("clip_vitl", clip_vision),
    "CLIP": ("clip_vitl", clip),
    "MAE's encoder": ("mae_vitl", lambda: build(ViTMAEModel, mae_config())),
    "MAE": ("mae_vitl", lambda: build(ViTMAEForPreTraining, mae_config())),
}


@fixture(params=MODELS)
def published(request):
    """The name of a VFM, transformers' model of it, and an image."""
    name, model = MODELS[request.param]
    size = (64, 64) if name.startswith("dinov3") else (70, 70)
    return name, model(), torch.randn(1, 3, *size)


@mark.parametrize("wrapping", ["saved", "state dict", "wrapped"])
def test_transformers_file_gives_transformers_features(published, wrapping, small, tmp_path):
    """As transformers saves it; with the names in memory; and wrapped twice."""
    name, model, image = published
    path = tmp_path / "model.safetensors"
    if wrapping == "saved":
        model.save_pretrained(tmp_path)
    else:
        path = tmp_path / "model.pth"
        start = "module.backbone." if wrapping == "wrapped" else ""
        torch.save({f"{start}{name}": value for name, value in model.state_dict().items()}, path)
    side = 16 if name.startswith("dinov3") else 14
    got = small(name, path, patch_size=side, img_size=tuple(image.shape[-2:]))
    assert_same_features(got, model, image)


@mark.parametrize("kind", ["encoder", "whole"])
def test_transformers_sam_gives_transformers_features(kind, small, tmp_path):
    if kind == "encoder":
        model = build(SamVisionModel, sam_vision_config())
    else:
        model = build(SamModel, SamConfig(vision_config=sam_vision_config()))
    model.save_pretrained(tmp_path)
    got = small("sam_vith", tmp_path / "model.safetensors", patch_size=16, img_size=(128, 128))
    image = torch.randn(1, 3, 128, 128)
    with torch.no_grad():
        states = model.vision_encoder(image, output_hidden_states=True).hidden_states[1:]
        maps = got.vit.forward_intermediates(
            image, indices=got.taps, norm=False, intermediates_only=True
        )
    for tap, features in zip(got.taps, maps, strict=True):
        expected = states[tap].permute(0, 3, 1, 2)
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_dinov3s_biases_of_query_and_value_are_not_dropped(small, tmp_path):
    dinov3(False).save_pretrained(tmp_path)
    with raises(ValueError, match="blocks.0.attn.qkv.bias is not zero.*_qkvb"):
        small("dinov3_vitl", tmp_path / "model.safetensors")


def test_a_head_beside_the_encoder_is_left_out_and_reported(small, tmp_path, caplog):
    config = Dinov2Config(**SIZES, image_size=70, patch_size=14)
    build(Dinov2ForImageClassification, config).save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO, public_weights.__name__):
        got = small("dinov2_vitl", tmp_path / "model.safetensors")
    assert "missing 0; unexpected 0; ignored 3 (classifier 2, mask_token 1)" in caplog.messages[-1]
    saved = load_file(tmp_path / "model.safetensors")
    assert torch.equal(got.vit.cls_token, saved["dinov2.embeddings.cls_token"])


@mark.parametrize("name", ["dinov2_vitl", "mae_vitl", "clip_vitl", "dinov3_vitl"])
def test_the_file_of_another_family_is_refused(name, small, tmp_path):
    other = {"clip_vitl": "MAE", "mae_vitl": "CLIP"}.get(name, "CLIP's encoder")
    MODELS[other][1]().save_pretrained(tmp_path)
    with raises(ValueError, match="weights do not fit: .*Missing: .*Unexpected: "):
        small(name, tmp_path / "model.safetensors")
