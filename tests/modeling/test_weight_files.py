"""Weights in the wrappings that people have: each is read, or refused in a sentence of its own."""

import json
import logging
from argparse import Namespace

import timm
import torch
from pytest import fixture, mark, raises
from safetensors.torch import save, save_file

from fishertune_d2.modeling import public_weights
from fishertune_d2.modeling.public_weights import load_vfm_weights


def tiny_vit(seed=0):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, img_size=32)


@fixture
def state():
    return tiny_vit().state_dict()


def assert_loads(place, state):
    vit = tiny_vit(seed=1)
    load_vfm_weights(vit, str(place))
    torch.testing.assert_close(dict(vit.state_dict()), dict(state), rtol=0, atol=0)


@fixture(params=["safetensors", "bin"])
def parts(request, state, tmp_path):
    """A folder with a model in three parts, and the index beside them."""
    end, names = request.param, sorted(state)
    start = "model" if end == "safetensors" else "pytorch_model"
    index = {}
    for number in (1, 2, 3):
        path = tmp_path / "d" / f"{start}-{number:05}-of-00003.{end}"
        path.parent.mkdir(exist_ok=True)
        part = {name: state[name] for name in names[number - 1 :: 3]}
        index |= dict.fromkeys(part, path.name)
        save_file(part, path) if end == "safetensors" else torch.save(part, path)
    (tmp_path / f"d/{start}.{end}.index.json").write_text(json.dumps({"weight_map": index}))
    (tmp_path / "d/config.json").write_text("{}")
    return tmp_path / "d"


def test_all_parts_are_read_from_one_of_them_the_index_or_the_folder(parts, state):
    index = next(parts.glob("*.index.json"))
    for place in (*(path for path in parts.iterdir() if "-of-" in path.name), index, parts):
        assert_loads(place, state)
    index.unlink()
    assert_loads(parts, state)


def test_a_missing_part_is_named(parts, state):
    second = next(parts.glob("*-00002-of-*"))
    second.unlink()
    for place in (next(parts.glob("*-00001-of-*")), next(parts.glob("*.index.json")), parts):
        with raises(ValueError, match=f"all of the 3 parts .* cannot be found: {second.name}"):
            assert_loads(place, state)


@mark.parametrize("content", ["{}", "[]", '{"weight_map": []}', "no json"])
def test_another_json_is_no_index(tmp_path, content, state):
    (tmp_path / "config.json").write_text(content)
    with raises(ValueError, match="config.json is no index of weights .*the file with the weights"):
        assert_loads(tmp_path / "config.json", state)


def test_a_folder_gives_its_one_model(tmp_path, state):
    snapshot = tmp_path / "models--x--y/snapshots/0123abc"
    snapshot.mkdir(parents=True)
    save_file(state, snapshot / "model.safetensors")
    torch.save({}, snapshot / "training_args.bin")
    assert_loads(snapshot, state)
    assert_loads(tmp_path / "models--x--y", state)  # as the hub's cache keeps it


def test_a_folder_with_several_models_or_none_is_refused(tmp_path, state):
    (tmp_path / "notes.txt").write_text("")
    with raises(ValueError, match="is a folder with no weights in it: set MODEL.VFM.WEIGHTS"):
        assert_loads(tmp_path, state)
    torch.save(state, tmp_path / "a.pth")
    assert_loads(tmp_path, state)
    torch.save(state, tmp_path / "b.pth")
    with raises(ValueError, match="is a folder with a.pth, b.pth in it: set .* to one file"):
        assert_loads(tmp_path, state)


@mark.parametrize("name", ["x.bin", "x.pth", "x", "x.safetensors", "x.txt"])
@mark.parametrize("kind", ["safetensors", "torch", "torch before 1.6"])
def test_the_content_tells_what_a_file_is(tmp_path, name, kind, state):
    path = tmp_path / name
    if kind == "safetensors":
        path.write_bytes(save(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    assert_loads(path, state)


@mark.parametrize(
    ("place", "command"),
    [
        ("https://example.org/a/vit.pth", "curl -L -o vit.pth 'https://example.org/a/vit.pth'"),
        ("https://example.org/vit.pth?download=true", "curl -L -o vit.pth 'https://example.org/v"),
        (
            "https://huggingface.co/a/b/blob/main/model.safetensors",
            "curl -L -o model.safetensors 'https://huggingface.co/a/b/resolve/main/model.safet",
        ),
        ("s3://bucket/vit.pth", "set MODEL.VFM.WEIGHTS to vit.pth"),
    ],
)
def test_an_address_is_to_be_downloaded_first(place, command, state):
    with raises(ValueError, match="is an address, and weights are read from files") as error:
        assert_loads(place, state)
    assert command in str(error.value)


def test_a_header_of_safetensors_may_begin_like_a_text(state, tmp_path):
    """A file begins with the header's length, whose bytes may be those of " <" or " {"."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    for start in (b" <", b" {"):
        length = int.from_bytes(start, "little")
        without = int.from_bytes(save(state, {"note": ""})[:8], "little")
        path = tmp_path / "model.safetensors"
        save_file(state, path, {"note": (length - without) * "x"})
        assert path.read_bytes()[:2] == start
        assert_loads(path, state)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@mark.parametrize("name", ["x.pth", "model.safetensors"])
@mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "Git LFS pointer.*git lfs pull"),
        (b"", "it is empty: download it again"),
        (b"\n<!doctype html><html>", "it is a web page.*download the file that the page links to"),
        (b'{"error": "gone"}', "it is a text in JSON"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "HDF5 file of Keras"),
        (b"GGUF" + bytes(99), "GGUF"),
    ],
)
def test_what_is_no_file_of_weights_says_what_it_is(tmp_path, name, content, message, state):
    (tmp_path / name).write_bytes(content)
    with raises(ValueError, match=f"cannot read weights from .*{name}: .*{message}"):
        assert_loads(tmp_path / name, state)


@mark.parametrize("kind", ["torch", "torch before 1.6", "safetensors"])
@mark.parametrize("part", [0.1, 0.5, 0.99])
def test_a_download_that_broke_off_is_damaged(tmp_path, kind, part, state):
    path = tmp_path / "x.pth"
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "torch")
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with raises(ValueError, match="cannot read weights from .*it is damaged.*Download it"):
        assert_loads(path, state)


class Hook:
    """Stands for what training frameworks save beside the tensors."""


@mark.parametrize("content", [{"model": {}, "hooks": Hook()}, Hook(), {"x": print}])
def test_objects_beside_the_tensors_are_named_without_torchs_advice(tmp_path, content, state):
    torch.save(content, tmp_path / "x.pth")
    with raises(ValueError, match=r"more than tensors.*the pickle asks for \S*(Hook|print)\."):
        assert_loads(tmp_path / "x.pth", state)


DAMAGED = [
    b"no pickle at all",
    bytes(range(256)),
    b"\x80\x02c__main__\nNoSuch\n.",
    b"PK\x03\x04 no zip",
]


@mark.parametrize("content", DAMAGED)
def test_no_error_says_to_turn_the_check_off(tmp_path, content, state):
    for name in ("x.pth", "x.safetensors"):
        (tmp_path / name).write_bytes(content)
        with raises(ValueError, match="cannot read weights from") as error:
            assert_loads(tmp_path / name, state)
        text = str(error.value)
        assert not any(word in text for word in ("weights_only", "trust", "safe_globals", "False"))


def test_the_options_of_a_training_do_not_stand_in_the_way(tmp_path, state):
    """MAE and DINO save argparse's Namespace beside their model; it runs no code."""
    torch.save({"model": state, "args": Namespace(lr=0.1), "epoch": 3}, tmp_path / "x.pth")
    assert_loads(tmp_path / "x.pth", state)


def wrap(state, prefix):
    return {f"{prefix}{name}": value for name, value in state.items()}


@mark.parametrize(
    "prefix",
    ["backbone.", "module.", "model.", "teacher.", "_orig_mod.", "encoder.", "module.backbone."]
    + ["module._orig_mod.model.teacher.backbone.", "_orig_mod.module."],
)
def test_what_wraps_a_model_is_taken_off_its_names(tmp_path, prefix, state, caplog):
    save_file(wrap(state, prefix), tmp_path / "x.safetensors")
    assert_loads(tmp_path / "x.safetensors", state)
    torch.save({"state_dict": wrap(state, prefix)}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, public_weights.__name__):
        assert_loads(tmp_path / "x.pth", state)
    assert caplog.messages[-1].endswith("missing 0; unexpected 0; ignored 0")


def test_what_lies_outside_of_the_wrapping_is_left_out_and_reported(tmp_path, state, caplog):
    """DINOv2's training saves a teacher with heads, mmsegmentation a decoder."""
    heads = {"dino_head.mlp.weight": torch.zeros(2), "norm.weight": torch.zeros(3)}
    torch.save({"teacher": wrap(state, "backbone.") | heads}, tmp_path / "x.pth")
    with caplog.at_level(logging.INFO, public_weights.__name__):
        assert_loads(tmp_path / "x.pth", state)
    assert caplog.messages[-1].endswith("unexpected 0; ignored 2 (dino_head 1, norm 1)")


def test_of_teacher_and_student_the_teacher_is_read(tmp_path, state):
    student = wrap(tiny_vit(seed=2).state_dict(), "model.backbone.")
    torch.save(student | wrap(state, "teacher.backbone."), tmp_path / "x.pth")
    assert_loads(tmp_path / "x.pth", state)


def test_several_encoders_are_refused(tmp_path, state):
    both = wrap(state, "backbone.") | wrap(state, "module.")
    torch.save(both, tmp_path / "x.pth")
    with raises(ValueError, match=r"holds several encoders: backbone\., module\.\. Save"):
        assert_loads(tmp_path / "x.pth", state)


def test_an_unknown_wrapping_is_not_taken_off(tmp_path, state):
    torch.save(wrap(state, "detector."), tmp_path / "x.pth")
    with raises(ValueError, match="Unexpected: detector"):
        assert_loads(tmp_path / "x.pth", state)
