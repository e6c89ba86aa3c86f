"""Files as the authors publish them, in small: same numbers, same features.

Each test gives a model's tensors the names of its authors by hand, the reverse of what the package
does, and adds what their files hold besides. The namings are those of openai/CLIP (d05afc4),
facebookresearch/dinov2 (b8931f7), dinov3 (6876159), mae (efb2a80) and segment-anything (dca509f),
and baaivision/EVA (5623d08): tiny models of their own code, saved by it, gave the same features.
"""

import io
import logging
import pickle
import re
import warnings
import zipfile

import torch
import torch.nn.functional as F
from pytest import fixture, mark, raises
from safetensors.torch import save_file
from torch import nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
)

from fishertune_d2.modeling import public_weights
from fishertune_d2.modeling.torchscript import TensorUnpickler


def rename(state, *swaps):
    """Replaces parts of names, in order; a pattern may end in $."""
    renamed = {}
    for name, tensor in state.items():
        for old, new in swaps:
            name = re.sub(old, new, name)
        renamed[name] = tensor
    return renamed


def noise(*names, shape=(2, 64)):
    return {name: torch.randn(shape) for name in names}


def clip(vit):
    state = rename(
        vit.state_dict(),
        (r"^patch_embed\.proj", "conv1"),
        (r"^norm_pre", "ln_pre"),
        (r"^norm\.", "ln_post."),
        (r"^blocks", "transformer.resblocks"),
        (r"\.norm(\d)", r".ln_\1"),
        (r"attn\.qkv\.", "attn.in_proj_"),
        (r"attn\.proj", "attn.out_proj"),
        (r"mlp\.fc1", "mlp.c_fc"),
        (r"mlp\.fc2", "mlp.c_proj"),
    )
    state["class_embedding"] = state.pop("cls_token")[0, 0]
    state["positional_embedding"] = state.pop("pos_embed")[0]
    state["proj"] = torch.randn(64, 32)
    text = noise("positional_embedding", "text_projection", "token_embedding.weight")
    text |= noise("transformer.resblocks.0.attn.in_proj_weight", "ln_final.weight")
    return rename(state, ("^", "visual.")) | text | {"logit_scale": torch.tensor(4.6)}


def dinov2(vit):
    state = rename(vit.state_dict()) | noise("mask_token")
    if vit.reg_token is not None:
        state["register_tokens"] = state.pop("reg_token")
        # One more position, which the class token's is added to.
        position = torch.randn(1, 1, 64)
        state["cls_token"] = state["cls_token"] - position
        state["pos_embed"] = torch.cat([position, state["pos_embed"]], dim=1)
    return state


def dinov2_giant(vit):
    return rename(dinov2(vit), (r"mlp\.fc1", "mlp.w12"), (r"mlp\.fc2", "mlp.w3"))


def mae(vit):
    decoder = noise("decoder_embed.weight", "decoder_pos_embed", "decoder_blocks.0.norm1.weight")
    return {"model": rename(vit.state_dict()) | decoder | noise("mask_token")}


def sam(vit):
    state = rename(vit.state_dict(), (r"mlp\.fc", "mlp.lin"), ("^", "image_encoder."))
    rest = noise("image_encoder.neck.0.weight", "mask_decoder.iou_token.weight")
    return state | rest | noise("prompt_encoder.no_mask_embed.weight", "pixel_mean")


def eva02(vit):
    state = rename(
        vit.state_dict(),
        (r"q_proj\.bias", "q_bias"),
        (r"v_proj\.bias", "v_bias"),
        (r"mlp\.norm", "mlp.ffn_ln"),
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
        (r"mlp\.fc2", "mlp.w3"),
        (r"^fc_norm", "norm"),
    )
    rest = noise("mask_token", "lm_head.weight", "rope.freqs_cos", "blocks.0.attn.rope.freqs_sin")
    return {"module": state | rest}


def eva02_clip(vit):
    state = rename(eva02(vit)["module"], (r"attn\.norm", "attn.inner_attn_ln"))
    state.pop("mask_token")
    head = noise("visual.head.weight", "text.ln_final.weight", "logit_scale")
    return rename(state, ("^", "visual.")) | head


def dinov3(vit):
    state = rename(
        vit.state_dict(),
        ("^reg_token", "storage_tokens"),
        (r"gamma_(\d)", r"ls\1.gamma"),
        (r"mlp\.fc1_g", "mlp.w1"),
        (r"mlp\.fc1_x", "mlp.w2"),
    )
    if any("mlp.w1" in name for name in state):
        state = rename(state, (r"mlp\.fc2", "mlp.w3"))
    for i in range(len(vit.blocks)):
        # Zero but for the key's, which is masked.
        state[f"blocks.{i}.attn.qkv.bias"] = (
            torch.randn(3, 64).index_fill(0, torch.tensor([0, 2]), 0).flatten()
        )
        state[f"blocks.{i}.attn.qkv.bias_mask"] = torch.ones(192)
    return state | noise("mask_token", "rope_embed.periods")


LAYOUTS = {
    "dinov2_vitl": dinov2,
    "dinov2_vitl_reg": dinov2,
    "dinov2_vitg": dinov2_giant,
    "dinov3_vitl": dinov3,
    "dinov3_vith_plus": dinov3,
    "clip_vitl": clip,
    "mae_vitl": mae,
    "sam_vith": sam,
    "eva02_vitl": eva02,
    "eva02_clip_vitl": eva02_clip,
}


def assert_same_features(got, expected, **tolerance):
    image = torch.randn(2, 3, 70, 84)
    with torch.no_grad():
        torch.testing.assert_close(
            got(image), expected(image), **(tolerance or {"rtol": 1e-6, "atol": 1e-6})
        )


@mark.parametrize("name", LAYOUTS)
def test_the_authors_file_gives_timms_features(name, small, tmp_path, caplog):
    backbone = small(name)
    torch.save(LAYOUTS[name](backbone.vit), tmp_path / "public.pth")
    with caplog.at_level(logging.INFO, public_weights.__name__):
        got = small(name, tmp_path / "public.pth", seed=1)
    assert_same_features(got, backbone)
    assert f"loaded {len(got.vit.state_dict())} (" in caplog.messages[-1]


@mark.parametrize("name", LAYOUTS)
def test_the_file_of_another_family_is_refused(name, small, tmp_path):
    families = list(LAYOUTS)
    other = families[(families.index(name) + 3) % len(families)]
    torch.save(LAYOUTS[other](small(other).vit), tmp_path / "other.pth")
    with raises(ValueError, match="weights do not fit: .*Missing: .*Unexpected: "):
        small(name, tmp_path / "other.pth")


@mark.parametrize("name", LAYOUTS)
def test_timms_safetensors_give_the_same_features(name, small, tmp_path):
    backbone = small(name)
    save_file(backbone.vit.state_dict(), tmp_path / "model.safetensors")
    assert_same_features(small(name, tmp_path / "model.safetensors", seed=1), backbone)


def test_the_report_counts_what_is_not_the_encoder(small, tmp_path, caplog):
    torch.save(sam(small("sam_vith").vit), tmp_path / "sam.pth")
    with caplog.at_level(logging.INFO, public_weights.__name__):
        small("sam_vith", tmp_path / "sam.pth")
    assert caplog.messages[-1].endswith(
        "loaded 87 (tokens 1, patch_embed 2, blocks 84); missing 0; unexpected 0; "
        "ignored 4 (image_encoder 1, mask_decoder 1, prompt_encoder 1, pixel_mean 1)"
    )


def test_a_bias_that_is_not_zero_is_not_dropped(small, tmp_path):
    state = dinov3(small("dinov3_vitl").vit)
    state["blocks.3.attn.qkv.bias"][0] = 1e-3
    torch.save(state, tmp_path / "dinov3.pth")
    with raises(
        ValueError, match="blocks.3.attn.qkv.bias is not zero, and vit_large_patch16_dinov"
    ):
        small("dinov3_vitl", tmp_path / "dinov3.pth")


@mark.parametrize("name", ["clip_vitl", "dinov2_vitl_reg", "eva02_vitl", "dinov3_vitl"])
def test_patches_of_14_become_16_by_one_bicubic_resize(name, small, tmp_path):
    """The converters of timm resize too, by other rules; they must not get to do it."""
    backbone = small(name)
    torch.save(LAYOUTS[name](backbone.vit), tmp_path / "public.pth")
    got = small(name, tmp_path / "public.pth", patch_size=16, img_size=(64, 64)).vit
    kernel = backbone.vit.patch_embed.proj.weight
    expected = F.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(got.patch_embed.proj.weight, expected, rtol=0, atol=0)


def test_evas_file_of_patches_of_16_stays_as_it_is(small, tmp_path):
    """Its authors resized it themselves: eva02_L_pt_m38m_p14to16.pt, from which Rein starts."""
    backbone = small("eva02_vitl", patch_size=16, img_size=(64, 64))
    torch.save({"model": eva02(backbone.vit)["module"]}, tmp_path / "p14to16.pt")
    got = small("eva02_vitl", tmp_path / "p14to16.pt", seed=1, patch_size=16, img_size=(64, 64))
    torch.testing.assert_close(dict(got.state_dict()), dict(backbone.state_dict()), rtol=0, atol=0)


def test_sams_positions_are_resized_as_sam_itself_does_it(small, tmp_path):
    """From a grid of 8 x 8 to 4 x 6: once when loading, or in every forward pass."""
    big = small("sam_vith", patch_size=16, img_size=(128, 128))
    torch.save(sam(big.vit), tmp_path / "sam.pth")
    got = small(
        "sam_vith", tmp_path / "sam.pth", patch_size=16, img_size=(64, 96), patch_resize="pi"
    )
    assert got.vit.pos_embed.shape == (1, 4, 6, 64)
    assert got.vit.blocks[2].attn.rel_pos_h.shape == (7, 32)
    assert got.vit.blocks[2].attn.rel_pos_w.shape == (11, 32)
    assert got.vit.blocks[0].attn.rel_pos_h.shape == (5, 32)  # a window's, as it was
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(got(image), big(image), rtol=1e-5, atol=1e-5)


def test_sams_positions_are_resized_by_plain_bicubic_interpolation(small, tmp_path):
    big = small("sam_vith", patch_size=16, img_size=(128, 128))
    torch.save(sam(big.vit), tmp_path / "sam.pth")
    got = small("sam_vith", tmp_path / "sam.pth", patch_size=16, img_size=(64, 96))
    positions = big.vit.pos_embed.permute(0, 3, 1, 2)
    expected = F.interpolate(positions, size=(4, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(got.vit.pos_embed, expected.permute(0, 2, 3, 1))


@mark.parametrize(
    ("name", "config", "model"),
    [
        ("dinov2_vitl", Dinov2Config, Dinov2Model),
        ("dinov2_vitg", Dinov2Config, Dinov2Model),
        ("dinov2_vitl_reg", Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    ],
)
def test_transformers_dinov2_gives_transformers_features(name, config, model, small, tmp_path):
    """The reference is transformers itself, file and features."""
    torch.manual_seed(0)
    giant = name == "dinov2_vitg"
    theirs = model(
        config(
            hidden_size=64,
            num_hidden_layers=6,
            num_attention_heads=2,
            image_size=70,
            patch_size=14,
            use_swiglu_ffn=giant,
            mlp_ratio=3 if giant else 4,  # of SwiGLU's, transformers takes two thirds
        )
    ).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    theirs.save_pretrained(tmp_path)
    got = small(name, tmp_path / "model.safetensors")
    image = torch.randn(1, 3, 70, 70)
    with torch.no_grad():
        expected = theirs(image, output_hidden_states=True).hidden_states
        maps = got.vit.forward_intermediates(image, indices=got.taps, intermediates_only=True)
    for tap, features in zip(got.taps, maps, strict=True):
        patches = expected[tap + 1][:, got.num_prefix_tokens :]
        torch.testing.assert_close(features.flatten(2).mT, patches, rtol=1e-5, atol=1e-5)


def as_module(state):
    """A module whose parameters have these names."""
    root = nn.Module()
    for name, tensor in state.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]
        module.register_parameter(last, nn.Parameter(tensor))
    return root


@fixture
def archive(small, tmp_path):
    """CLIP as OpenAI publishes it: a TorchScript archive in half precision."""
    backbone = small("clip_vitl")
    state = {name: tensor.half() for name, tensor in clip(backbone.vit).items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit is on its way out
        torch.jit.save(torch.jit.script(as_module(state)), str(tmp_path / "ViT.pt"))
    for parameter in backbone.parameters():
        parameter.data = parameter.data.half().float()
    return tmp_path / "ViT.pt", backbone


def repack(path, change):
    """Copies a zip file, each member through ``change(name, content)``; None drops it."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(f"{path}.new", "w") as new:
        for name in old.namelist():
            content = change(name, old.read(name))
            if content is not None:
                new.writestr(name, content)
    return f"{path}.new"


def test_openais_archive_gives_timms_features(archive, small):
    path, backbone = archive
    assert_same_features(small("clip_vitl", path, seed=1), backbone)


def test_the_program_in_an_archive_is_not_even_read(archive, small):
    path, backbone = archive
    path = repack(path, lambda name, content: None if "/code/" in name else content)
    assert_same_features(small("clip_vitl", path, seed=1), backbone)


class Hostile:
    """Creates a file as soon as it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_an_archive_whose_pickle_runs_code_is_refused(archive, small, tmp_path):
    path, _ = archive
    hostile = pickle.dumps(Hostile(tmp_path / "harm"), protocol=2)
    path = repack(path, lambda name, content: hostile if name.endswith("/data.pkl") else content)
    with raises(ValueError, match=r"can run code\): .*the pickle asks for \w*io.open"):
        small("clip_vitl", path)
    assert not (tmp_path / "harm").exists()


@mark.parametrize("name", ["system", "eval", "_rebuild_tensor_v2", "__torch__"])
def test_an_archives_names_are_refused_but_for_a_handful(name):
    unpickler = TensorUnpickler(io.BytesIO(), None, None)
    with raises(pickle.UnpicklingError, match=f"the pickle asks for torch.{name}"):
        unpickler.find_class("torch", name)


def test_a_tensor_beyond_its_storage_is_refused(archive, small):
    path, _ = archive

    def shorten(name, content):
        return content[: len(content) // 2] if name.endswith("/data/0") else content

    with raises(ValueError, match="cannot read weights from .*setStorage"):
        small("clip_vitl", repack(path, shorten))
