"""Deltas of tiny models of every layout, and of what does not fit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from pytest import mark, raises
from safetensors import safe_open
from safetensors.torch import save_file

from fishertune_d2.export import Architecture, Delta, apply_delta
from fishertune_d2.export.delta import digest
from fishertune_d2.export.tensor_change import TensorChange

ROOT = Path(__file__).resolve().parents[2]
PIXELS = (127.5, 127.5, 127.5)
ARCHITECTURE = Architecture("tiny", "test_vit.r160_in1k", (160, 160), 16, PIXELS, PIXELS)


def assert_same_bits(got, expected):
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert digest(got[name]) == digest(tensor), name


def tuned_from(base, share=0.05, seed=1):
    """A copy with about ``share`` of every tensor's entries moved."""
    generator = torch.Generator().manual_seed(seed)
    tuned = {}
    for name, tensor in base.items():
        moves = torch.rand(tensor.shape, generator=generator) < share
        tuned[name] = torch.where(moves, tensor * 1.01 + 1e-3, tensor)
    return tuned


def copied(state):
    return {name: tensor.clone() for name, tensor in state.items()}


def copy_of(model):
    return copied(model.state_dict())


@mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 1.0])
def test_round_trip_to_the_bit_in_every_layout(vit, family, share, tmp_path):
    base = copy_of(vit(family))
    tuned = tuned_from(base, share)
    delta = Delta.between(base, tuned, ARCHITECTURE)
    delta.notes = {"method": "fishertune"}
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert (loaded.architecture, loaded.notes) == (ARCHITECTURE, delta.notes)
    assert loaded.changed == sum(int((base[name] != tuned[name]).sum()) for name in base)
    assert (loaded.whole.keys() == base.keys()) == (share == 1.0)  # positions would cost more

    model = vit(family)
    apply_delta(model, tmp_path / "delta.safetensors")
    assert_same_bits(model.state_dict(), tuned)


def test_bits_are_compared_not_numbers():
    base = {"w": torch.tensor([0.0, float("nan"), 1.0, 2.0, 5.0, 6.0])}
    tuned = {"w": torch.tensor([-0.0, float("nan"), 1.0, 2.0, 5.0, 7.0])}
    delta = Delta.between(base, tuned, ARCHITECTURE)
    assert delta.changes["w"].positions.tolist() == [0, 5]
    assert_same_bits(delta.apply(base), tuned)


@mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype, tmp_path):
    base = {"w": torch.randn(40, 30).to(dtype), "scalar": torch.tensor(1.0, dtype=dtype)}
    tuned = tuned_from(base)
    Delta.between(base, tuned, ARCHITECTURE).save(tmp_path / "delta.safetensors")
    delta = Delta.load(tmp_path / "delta.safetensors")
    assert_same_bits(delta.apply(base), tuned)
    with raises(ValueError, match="2 of 2 tensors differ, scalar, w.*in the same precision"):
        delta.apply({name: tensor.float() for name, tensor in base.items()})


def test_resized_tensors_travel_whole_and_need_no_base_of_their_own(vit):
    base = copy_of(vit())
    tuned = tuned_from(base) | {"pos_embed": base["pos_embed"]}
    delta = Delta.between(base, tuned, ARCHITECTURE, resized={"pos_embed"})
    # As another processor would have resized it, or timm.
    elsewhere = base | {"pos_embed": base["pos_embed"] * (1 + 1e-6)}
    assert_same_bits(delta.apply(elsewhere), tuned)
    with raises(ValueError, match=r"pos_embed is float32 \(1, 17, 24\).* float32 \(1, 5, 24\)"):
        delta.apply(base | {"pos_embed": base["pos_embed"][:, :5]})


def test_the_size_for_vit_large(tmp_path):
    """5 % of its 304.2 M weights at random, with patch kernel and position embedding whole."""
    with torch.device("meta"):
        vit = timm.create_model("vit_large_patch14_dinov2", img_size=512, patch_size=16)
    sizes = {name: tensor.numel() for name, tensor in vit.state_dict().items()}
    resized = {"pos_embed", "patch_embed.proj.weight"}
    delta = Delta(ARCHITECTURE, base={name: 64 * "0" for name in sizes.keys() - resized})
    delta.whole = {name: torch.zeros(sizes[name]) for name in resized}
    generator = torch.Generator().manual_seed(0)
    for name in delta.base:
        positions = torch.empty(sizes[name] // 20, dtype=torch.int64)
        positions = positions.geometric_(0.05, generator=generator).cumsum(0) - 1
        if len(positions):
            delta.changes[name] = TensorChange(None, positions, torch.zeros(len(positions)))
    delta.save(tmp_path / "delta.safetensors")
    share = (tmp_path / "delta.safetensors").stat().st_size / (4 * sum(sizes.values()))
    assert 0.068 < share < 0.069
    loaded = Delta.load(tmp_path / "delta.safetensors")
    name = "blocks.20.mlp.fc1.weight"
    assert torch.equal(loaded.changes[name].positions, delta.changes[name].positions)


@mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 64}, r"pos_embed is float32 \(1, 101, 64\); the model's is .*17"),
        ({"embed_dim": 32}, r"pos_embed is float32 \(1, 101, 64\); the model's is .*32"),
        ({"depth": 4}, "the model lacks blocks.4.attn.proj.bias, .* and 21 more"),
        # All but norms and biases, which begin as ones and zeros in both.
        (
            {},
            "27 of 77 tensors differ, blocks.0.attn.proj.weight, .* the weights of public.safetens",
        ),
    ],
)
def test_a_wrong_base_is_refused_and_nothing_is_changed(options, message, tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("test_vit", num_classes=0, img_size=160).state_dict()
    delta = Delta.between(base, tuned_from(base), ARCHITECTURE, resized={"pos_embed"})
    delta.notes = {"weights": "public.safetensors"}
    delta.save(tmp_path / "delta.safetensors")
    torch.manual_seed(1)
    model = timm.create_model("test_vit", **{"num_classes": 0, "img_size": 160, **options})
    before = copy_of(model)
    with raises(ValueError, match=message) as error:
        apply_delta(model, tmp_path / "delta.safetensors")
    assert str(tmp_path / "delta.safetensors") in str(error.value)
    assert "test_vit.r160_in1k with img_size=(160, 160)" in str(error.value)
    assert_same_bits(model.state_dict(), before)


def test_applying_twice_is_refused(vit):
    base = copy_of(vit())
    model = vit()
    delta = Delta.between(base, tuned_from(base), ARCHITECTURE)
    apply_delta(model, delta)
    with raises(ValueError, match="and apply it once"):
        apply_delta(model, delta)


def test_a_classifier_on_top_stays(vit):
    base = {name: tensor for name, tensor in copy_of(vit()).items() if "head" not in name}
    delta = Delta.between(base, tuned_from(base), ARCHITECTURE)
    model = vit()
    apply_delta(model, delta)
    assert_same_bits(model.state_dict(), {**copy_of(vit()), **tuned_from(base)})


@mark.parametrize(
    ("tuned", "message"),
    [
        ({"a": torch.zeros(3)}, "they lack b, and have the surplus none"),
        ({"a": torch.zeros(3), "b": torch.zeros(1), "c": torch.zeros(1)}, "have the surplus c"),
        ({"a": torch.zeros(4), "b": torch.zeros(1)}, r"a is float32 \(4,\), not float32 \(3,\)"),
        ({"a": torch.zeros(3).half(), "b": torch.zeros(1)}, r"a is float16 \(3,\), not float32"),
    ],
)
def test_weights_of_another_model_have_no_delta(tuned, message):
    with raises(ValueError, match=message):
        Delta.between({"a": torch.zeros(3), "b": torch.zeros(1)}, tuned, ARCHITECTURE)


@pytest.fixture
def file(tmp_path):
    """A delta that changes entries 1 and 3 of "w", row 2 of "m", and all of "v"."""
    base = small_base()
    tuned = copied(base) | {"v": torch.ones(2)}
    tuned["w"][[1, 3]] = -1.0
    tuned["m"][2] = 1.0
    path = tmp_path / "delta.safetensors"
    Delta.between(base, tuned, ARCHITECTURE).save(path)
    return path


def small_base():
    return {"w": torch.arange(10.0), "v": torch.zeros(2), "m": torch.zeros(4, 5)}


def rewrite(path, tensors=None, metadata=None, **header):
    """Writes the file anew, with some of its parts replaced; None drops a part."""
    with safe_open(path, framework="pt") as old:
        texts = old.metadata()
        content = {name: old.get_tensor(name) for name in old.keys()}
    content = {name: t for name, t in {**content, **(tensors or {})}.items() if t is not None}
    texts["header"] = json.dumps({**json.loads(texts["header"]), **header})
    texts = {name: text for name, text in {**texts, **(metadata or {})}.items() if text is not None}
    save_file(content, path, metadata=texts)


def test_a_file_that_is_cut_short_is_refused(file):
    content = file.read_bytes()
    for length in (0, 5, 8, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        with raises(ValueError, match="delta.safetensors cannot be used: .*Put back the file"):
            Delta.load(file)


@mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"format": "fishertune_delta_v3"},
            "its format is '.*_v3', not '.*_v1' or 'fishertune_delta_v2': use the version of",
        ),
        (
            {"format": "fishertune_selection_v1"},
            "its format is .*selection_v1', not .*delta_v1' or .*delta_v2'. Put",
        ),
        ({"format": None}, "its format is '', not .*delta_v1' or .*delta_v2'. Put back"),
        ({"header": None}, "its header lacks 'header'"),
        ({"header": "{"}, "Expecting property name"),
        ({"header": "[]"}, "its header is a list, where a dict was"),
        ({"header": 100_000 * "["}, "maximum recursion depth"),
    ],
)
def test_another_format_is_refused(file, metadata, message):
    rewrite(file, metadata=metadata)
    with raises(ValueError, match=f"delta.safetensors cannot be used: {message}"):
        Delta.load(file)


def bytes_of(*values):
    return torch.tensor(values, dtype=torch.uint8)


@mark.parametrize(
    ("tensors", "message"),
    [
        ({"gaps/w": bytes_of(1, 255)}, "the last gap does not end"),
        ({"gaps/w": bytes_of(1)}, "it has 1 positions in w, and 2 values"),
        ({"gaps/w": bytes_of(1, 1, 1)}, "it has 3 positions in w, and 2 values"),
        ({"gaps/w": bytes_of(1, 255, 1, 1)}, "it has 3 positions in w, and 2 values"),
        ({"gaps/w": torch.tensor([1, 1])}, r"gaps/w is int64 \(2,\), no vector of uint8"),
        ({"gaps/w": bytes_of(1, 1)[None]}, r"gaps/w is uint8 \(1, 2\), no vector"),
        ({"values/w": torch.ones(2, 1)}, r"values/w is float32 \(2, 1\), which does not fit gaps"),
        (
            {"gaps/w": None},
            "it has values of w: a change has values and one of gaps, rows, columns",
        ),
        ({"values/w": None}, "it has gaps of w: a change has values"),
        ({"gaps/w": bytes_of(), "values/w": torch.ones(0)}, "it has 0 positions in w, and 0"),
        ({"gaps/x": bytes_of(0), "values/x": torch.ones(1)}, "it has gaps of x, which its base"),
        ({"gaps/v": bytes_of(0), "values/v": torch.ones(1)}, "it has gaps and values and whole of"),
        ({"gaps/m": bytes_of(0)}, "it has gaps and rows and values of m"),
        ({"columns/m": bytes_of(0)}, "it has columns and rows and values of m"),
        ({"whole/m": torch.ones(4, 5)}, "it has rows and values and whole of m"),
        ({"rows/m": bytes_of(0, 255)}, "the last gap does not end"),
        ({"rows/m": bytes_of(0, 0)}, "it has 2 positions in m, and 1 values"),
        ({"rows/m": bytes_of()}, "it has 0 positions in m, and 1 values"),
        ({"rows/m": torch.ones(1)}, r"rows/m is float32 \(1,\), no vector of uint8"),
        ({"values/m": torch.ones(1)}, r"values/m is float32 \(1,\), which does not fit rows"),
        ({"values/m": torch.tensor(1.0)}, r"values/m is float32 \(\), which does not fit rows"),
        ({"code/w": torch.ones(1)}, "it holds code/w, which is none of gaps, rows, columns, val"),
        ({"w": torch.ones(1)}, "it holds w, which is none of"),
    ],
)
def test_hostile_tensors_are_refused(file, tensors, message):
    rewrite(file, tensors)
    with raises(ValueError, match=f"delta.safetensors cannot be used: .*{message}"):
        Delta.load(file)


@mark.parametrize(
    "header",
    [
        {"base": None},
        {"base": {"w": 1}},
        {"notes": []},
        {"changed": "2"},
        {"changed": -1},
        {"architecture": {}},
        {"architecture": {**vars(ARCHITECTURE), "img_size": [160]}},
        {"architecture": {**vars(ARCHITECTURE), "img_size": "16"}},
        {"architecture": {**vars(ARCHITECTURE), "patch_size": 1.5}},
        {"architecture": {**vars(ARCHITECTURE), "vfm": ["tiny"]}},
        {"architecture": {**vars(ARCHITECTURE), "pixel_mean": [float("nan"), 1, 1]}},
    ],
)
def test_hostile_headers_are_refused(file, header):
    rewrite(file, **header)
    with raises(ValueError, match="delta.safetensors cannot be used: its header is damaged"):
        Delta.load(file)


@mark.parametrize(
    ("tensors", "message"),
    [
        ({"gaps/w": bytes_of(1, 8)}, "damaged at w: it changes entry 10, and the model's end at 9"),
        ({"gaps/w": bytes_of(255, 255, 7, 0)}, "at w: it changes entry 518, and the model's end"),
        ({"rows/m": bytes_of(4)}, "damaged at m: it changes row 4, and the model's end at 3"),
        (
            {"rows/m": None, "columns/m": bytes_of(5), "values/m": torch.ones(1, 4)},
            "damaged at m: it changes column 5, and the model's end at 4",
        ),
        (
            {"rows/m": None, "columns/m": bytes_of(2)},
            r"damaged at m: it has values \(5,\) for a column, which is \(4,\)",
        ),
        ({"values/m": torch.ones(1, 1)}, r"at m: it has values \(1,\) for a row, which is \(5,\)"),
        ({"values/m": torch.ones(1, 5, 1)}, "at m: its rows are of a tensor of 3 dimensions"),
        ({"values/m": torch.ones(1, 5).half()}, "at m: its values are torch.float16, the model's"),
        (
            {"rows/m": None, "gaps/m": bytes_of(20), "values/m": torch.ones(1)},
            "damaged at m: it changes entry 20, and the model's end at 19",
        ),
        (
            {"rows/w": bytes_of(0), "gaps/w": None, "values/w": torch.ones(1, 2)},
            "at w: its rows are of a tensor of 2 dimensions, and the model's has 1",
        ),
        (
            {"columns/w": bytes_of(0), "gaps/w": None, "values/w": torch.ones(1, 2)},
            "at w: its columns are of a tensor of 2 dimensions, and the model's has 1",
        ),
        ({"values/w": torch.ones(2).double()}, "at w: its values are torch.float64, the model's"),
        ({"whole/v": torch.ones(2).half()}, "at v: it is torch.float16, the model's torch.float32"),
        ({"whole/v": torch.ones(3)}, r"in which v is float32 \(3,\); the model's is float32"),
        ({"whole/x": torch.ones(3)}, "the model lacks x"),
    ],
)
def test_what_does_not_fit_the_base_is_refused(file, tensors, message):
    rewrite(file, tensors)
    delta = Delta.load(file)
    base = small_base()
    with raises(ValueError, match=f"delta.safetensors .*{message}"):
        delta.apply(base)
    assert_same_bits(base, small_base())


def test_a_file_of_version_1_still_loads(tmp_path):
    """Version 1 stored the entries that differ; its tensors had the names of today."""
    base = small_base()
    tuned = copied(base) | {"v": torch.ones(2)}
    tuned["w"][[1, 3]] = -1.0
    tuned["m"][:, 1] = 2.0
    old = {
        "gaps/w": bytes_of(1, 1),  # the entries that are skipped before each
        "values/w": torch.tensor([-1.0, -1.0]),
        "gaps/m": bytes_of(1, 4, 4, 4),
        "values/m": torch.tensor([2.0, 2.0, 2.0, 2.0]),
        "whole/v": torch.ones(2),
        "decoder/head.weight": torch.ones(3),
    }
    header = {
        "architecture": vars(ARCHITECTURE),
        "base": {name: digest(tensor) for name, tensor in base.items()},
        "changed": 8,
        "notes": {"method": "fishertune"},
    }
    texts = {"format": "fishertune_delta_v1", "header": json.dumps(header)}
    save_file(old, tmp_path / "old.safetensors", metadata=texts)
    delta = Delta.load(tmp_path / "old.safetensors")
    assert (delta.changed, delta.notes) == (8, {"method": "fishertune"})
    assert delta.decoder.keys() == {"head.weight"}
    assert_same_bits(delta.apply(base), tuned)


def test_a_missing_file_is_named(tmp_path):
    with raises(FileNotFoundError, match="none.safetensors"):
        Delta.load(tmp_path / "none.safetensors")


def test_applies_where_detectron2_is_not_installed(tmp_path):
    torch.manual_seed(0)
    base = timm.create_model("test_vit", num_classes=0).state_dict()
    tuned = tuned_from(base)
    Delta.between(base, tuned, ARCHITECTURE).save(tmp_path / "delta.safetensors")
    save_file(tuned, tmp_path / "tuned.safetensors")
    code = (
        "import sys; sys.modules['detectron2'] = None\n"
        "import timm, torch; from safetensors.torch import load_file\n"
        "from fishertune_d2.export import apply_delta\n"
        "torch.manual_seed(0); model = timm.create_model('test_vit', num_classes=0)\n"
        "apply_delta(model, sys.argv[1]); tuned = load_file(sys.argv[2])\n"
        "print(all(torch.equal(t, tuned[n]) for n, t in model.state_dict().items()))"
    )
    files = [str(tmp_path / name) for name in ("delta.safetensors", "tuned.safetensors")]
    run = subprocess.run(
        [sys.executable, "-c", code, *files], cwd=ROOT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout.strip()) == (0, "True"), run.stderr
