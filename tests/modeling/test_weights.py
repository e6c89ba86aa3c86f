import logging
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from pytest import approx, mark, raises
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize, pil_to_tensor

from fishertune_d2.modeling import public_weights
from fishertune_d2.modeling.public_weights import load_vfm_weights
from fishertune_d2.modeling.vfm import VFMBackbone


def tiny_vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    return timm.create_model("test_vit", num_classes=0, **kwargs)


def backbone(path, **kwargs) -> VFMBackbone:
    torch.manual_seed(99)
    kwargs = {"name": "tiny", "img_size": (160, 160), "patch_size": 16} | kwargs
    return VFMBackbone(weights=str(path), **kwargs)


def assert_same(got, expected, **tolerance):
    torch.testing.assert_close(dict(got), dict(expected), **(tolerance or {"rtol": 0, "atol": 0}))


@pytest.fixture
def public(tmp_path):
    """A public file for the VFM "tiny": patches of 14, a grid of 5 x 5."""
    state = tiny_vit(img_size=70, patch_size=14).state_dict()
    save_file(state, tmp_path / "public.safetensors")
    return tmp_path / "public.safetensors"


@pytest.fixture
def no_network(monkeypatch):
    """A hub that is not cached and cannot be reached."""

    class Unreachable:
        def model_info(self, repo, timeout):
            raise ConnectionError("no route to the hub")

    monkeypatch.setattr(public_weights, "HfApi", Unreachable)
    monkeypatch.setattr(public_weights, "try_to_load_from_cache", lambda *args: None)


@mark.parametrize("nest", [None, "model", "state_dict", "teacher"])
def test_a_pth_file_comes_back_exactly(tmp_path, nest):
    state = tiny_vit(img_size=160).state_dict()
    torch.save({nest: state, "epoch": 3} if nest else state, tmp_path / "vit.pth")
    assert_same(backbone(tmp_path / "vit.pth").vit.state_dict(), state)


def test_a_safetensors_file_comes_back_exactly(tmp_path):
    state = tiny_vit(img_size=160).state_dict()
    save_file(state, tmp_path / "vit.safetensors")
    assert_same(backbone(tmp_path / "vit.safetensors").vit.state_dict(), state)


def test_half_precision_becomes_float32(tmp_path):
    state = tiny_vit(img_size=160).half().state_dict()
    save_file(state, tmp_path / "half.safetensors")
    expected = {name: value.float() for name, value in state.items()}
    assert_same(backbone(tmp_path / "half.safetensors").vit.state_dict(), expected)


def test_metas_extras_are_ignored_and_reported(tmp_path, caplog):
    """Meta's DINOv2 files differ from timm's names by a mask token; classifiers add a head."""
    state = tiny_vit(img_size=160).state_dict()
    extras = {"mask_token": torch.zeros(1, 64), "head.weight": torch.zeros(10, 64)}
    torch.save(state | extras, tmp_path / "meta.pth")
    with caplog.at_level(logging.INFO, public_weights.__name__):
        assert_same(backbone(tmp_path / "meta.pth").vit.state_dict(), state)
    report = caplog.messages[-1]
    assert "loaded 78 (tokens 2, patch_embed 2, blocks 72, norm 2); missing 0; unexp" in report
    assert report.endswith("ignored 2 (mask_token 1, head 1)")


def test_pi_resizes_as_timm_itself_does(public):
    """The reference is timm's own loading, for a grid that is not square."""
    expected = timm.create_model(
        "test_vit",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(public), "num_classes": 0},
        num_classes=0,
        img_size=(160, 96),
    ).state_dict()
    got = backbone(public, img_size=(160, 96), patch_resize="pi").vit.state_dict()
    assert_same(got, expected)


def test_bicubic_resizes_as_rein_does(public):
    state = tiny_vit(img_size=70, patch_size=14).state_dict()
    got = backbone(public, img_size=(160, 96)).vit.state_dict()

    kernel = F.interpolate(state["patch_embed.proj.weight"], size=(16, 16), mode="bicubic")
    torch.testing.assert_close(got["patch_embed.proj.weight"], kernel, rtol=0, atol=0)

    grid = state["pos_embed"][:, 1:].reshape(1, 5, 5, 64).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(10, 6), mode="bicubic", align_corners=False)
    torch.testing.assert_close(got["pos_embed"][:, 1:], grid.flatten(2).transpose(1, 2))
    torch.testing.assert_close(got["pos_embed"][:, :1], state["pos_embed"][:, :1])


def test_a_square_grid_is_resized_to_another_shape_of_the_same_count(tmp_path):
    state = tiny_vit(img_size=64).state_dict()
    state["pos_embed"] = torch.arange(17.0)[None, :, None].repeat(1, 1, 64)
    save_file(state, tmp_path / "vit.safetensors")
    got = backbone(tmp_path / "vit.safetensors", img_size=(32, 128)).vit.state_dict()["pos_embed"]
    assert got.shape == (1, 17, 64)
    # Row-major 1..16: the mean of the upper half is 4.5. Kept as 2 x 8, that would hold too, but
    # a row would then span 7, and not, as in the square, about 3.
    upper = got[0, 1:9, 0]
    assert upper.mean().item() == approx(4.5, abs=0.5)
    assert (upper.max() - upper.min()).item() == approx(3, abs=0.5)


@mark.parametrize(("patch_resize", "growth"), [("bicubic", (16 / 14) ** 2), ("pi", 1.0)])
def test_response_to_a_uniform_image(tmp_path, patch_resize, growth):
    vit = tiny_vit(img_size=70, patch_size=14)
    torch.nn.init.constant_(vit.patch_embed.proj.weight, 0.01)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    got = backbone(tmp_path / "vit.safetensors", patch_resize=patch_resize).vit
    sums = got.patch_embed.proj.weight.detach().sum((2, 3)) / (0.01 * 14**2)
    assert sums.mean().item() == approx(growth, rel=1e-4)


def test_random_is_asked_for_by_name_and_logged(no_network, caplog):
    backbone("random")
    assert "keeps its random initialisation" in caplog.text
    with raises(RuntimeError, match="no weights for test_vit"):
        backbone("")


def test_without_any_source_the_error_names_causes_and_remedies(no_network):
    def broken():
        raise OSError("no index either")

    with raises(RuntimeError) as error:
        load_vfm_weights(tiny_vit(), "", fallback=broken, source="https://authors.org/vit.pth")
    causes = ("no route to the hub", "no index either")
    for part in (*causes, "https://authors.org/vit.pth", "MODEL.VFM.WEIGHTS", '"random"'):
        assert part in str(error.value)


def test_the_fallback_is_taken_when_the_hub_fails(no_network, public, caplog):
    vit = tiny_vit(seed=1, img_size=70, patch_size=14)
    load_vfm_weights(vit, "", fallback=lambda: public)
    assert_same(vit.state_dict(), tiny_vit(img_size=70, patch_size=14).state_dict())
    assert "no weights from timm's hub: ConnectionError: no route" in caplog.text


def test_the_hub_comes_before_the_fallback(monkeypatch, no_network):
    state = tiny_vit().state_dict()

    class Reachable:
        def model_info(self, repo, timeout):
            assert repo == "timm/test_vit.r160_in1k"

    monkeypatch.setattr(public_weights, "HfApi", Reachable)
    monkeypatch.setattr(public_weights, "load_state_dict_from_hf", lambda repo: dict(state))
    vit = tiny_vit(seed=1)
    load_vfm_weights(vit, "", fallback=lambda: pytest.fail("asked without need"))
    assert_same(vit.state_dict(), state)


def test_the_hubs_cache_needs_no_network(monkeypatch, no_network, tmp_path):
    state = tiny_vit().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    cached = str(tmp_path / "model.safetensors")
    monkeypatch.setattr(public_weights, "try_to_load_from_cache", lambda repo, name: cached)
    vit = tiny_vit(seed=1)
    load_vfm_weights(vit, "")
    assert_same(vit.state_dict(), state)


def drop_norm(state):
    return {name: value for name, value in state.items() if not name.startswith("norm.")}


@mark.parametrize(
    ("change", "message"),
    [
        (drop_norm, "Missing: norm.weight, norm.bias. Unexpected: none"),
        (lambda s: s | {"blocks.0.adapter": torch.zeros(3)}, "Unexpected: blocks.0.adapter."),
        (
            lambda s: s | {"norm.weight": torch.zeros(65)},
            r"Wrong shape: norm.weight \(65,\), not \(64,\)",
        ),
        (
            lambda s: s | {"pos_embed": torch.zeros(1, 90, 64)},
            r"Wrong shape: pos_embed \(1, 90, 64\), not \(1, 101, 64\)",
        ),
        (
            lambda s: {f"backbone.vit.{name}": value for name, value in s.items()},
            "70 more.*whole segmentor belongs in MODEL.WEIGHTS",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_and_nothing_is_loaded(tmp_path, change, message):
    torch.save(change(tiny_vit(img_size=160).state_dict()), tmp_path / "vit.pth")
    vit = tiny_vit(seed=1, img_size=160)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    with raises(ValueError, match=message) as error:
        load_vfm_weights(vit, str(tmp_path / "vit.pth"))
    assert "vit.pth" in str(error.value) and "MODEL.VFM.WEIGHTS" in str(error.value)
    assert_same(vit.state_dict(), before)


def test_a_deeper_model_is_refused(tmp_path):
    vit = timm.create_model("test_vit2", num_classes=0)  # eight blocks, no class token
    torch.save(vit.state_dict(), tmp_path / "deep.pth")
    with raises(ValueError, match="Missing: cls_token.*Unexpected: reg_token, blocks"):
        backbone(tmp_path / "deep.pth")


def test_a_missing_file_is_named():
    with raises(FileNotFoundError, match="no weights file nowhere/vit.pth. Set MODEL.VFM.WEIGHTS"):
        backbone("nowhere/vit.pth")


class Hostile:
    """Creates a file as soon as it is unpickled without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    torch.save({"model": Hostile(tmp_path / "harm")}, tmp_path / "hostile.pth")
    with raises(ValueError, match="cannot read weights from .*hostile.pth.* can run code"):
        backbone(tmp_path / "hostile.pth")
    assert not (tmp_path / "harm").exists()


@mark.parametrize("name", ["vit.pth", "vit.safetensors"])
def test_a_damaged_file_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"<html>not found</html>")
    with raises(ValueError, match=f"cannot read weights from .*{name}"):
        backbone(tmp_path / name)


@mark.parametrize("content", [{}, {"epoch": 3}, [torch.zeros(2)]])
def test_a_file_without_a_state_dict_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    with raises(ValueError, match="other.pth"):
        backbone(tmp_path / "other.pth")


def day_images(folder: Path, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised CamVid images (count, 3, 224, 280) and their patches' labels (count * 16 * 20)."""
    paths = sorted(p for p in folder.glob("*.jpg") if not p.name.startswith("0001TP"))
    images, labels = [], []
    for path in paths[:: len(paths) // count][:count]:
        images.append(pil_to_tensor(Image.open(path).resize((280, 224))).float())
        label = Image.open(folder.with_name(folder.name + "annot") / f"{path.stem}.png")
        labels.append(pil_to_tensor(label.resize((20, 16), Image.Resampling.NEAREST)).flatten())
    mean, std = [123.675, 116.28, 103.53], [58.395, 57.12, 57.375]
    return normalize(torch.stack(images), mean, std), torch.cat(labels).long()


def test_public_weights_tell_classes_apart_where_random_ones_do_not(shared_dir):
    """A ridge regression from patches to classes, fitted on six images and scored on three."""
    folder = shared_dir / "datasets/CamVid"
    (train, train_labels), (test, test_labels) = (
        day_images(folder / split, count) for split, count in (("train", 6), ("test", 3))
    )

    def accuracy(weights) -> float:
        vit = backbone(weights, name="dinov2_vits", img_size=(224, 280), patch_size=14).vit.eval()

        def tokens(images):
            with torch.no_grad():
                return F.layer_norm(vit.forward_features(images)[:, 1:].flatten(0, 1), (384,))

        x, y = tokens(train), F.one_hot(train_labels, 12).float()
        solution = torch.linalg.solve(x.T @ x + 10 * torch.eye(384), x.T @ y)
        labelled = test_labels != 11
        return ((tokens(test) @ solution).argmax(1) == test_labels)[labelled].float().mean().item()

    public = accuracy(shared_dir / "weights/dinov2_vits14_fp16.safetensors")
    assert public > accuracy("random") + 0.1  # measured: 0.70 against 0.52
