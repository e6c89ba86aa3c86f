"""Text towers against open_clip's CLIP models, and the files from which they load."""

import logging
import sys

import pytest
import torch
from detectron2.data import MetadataCatalog
from pytest import mark, raises
from safetensors.torch import save_file
from torch import nn

from fishertune_d2.engine.stages import prepare_stage
from fishertune_d2.modeling import text_tower
from fishertune_d2.modeling.frozen import frozen_parameters
from fishertune_d2.modeling.text_tower import TEXT_TOWERS, TextTower, class_names
from fishertune_d2.tuning import TUNING_REGISTRY

open_clip = pytest.importorskip("open_clip")

TEXTS = ["road", "traffic light", "a clean origami of a terrain"]
SMALL_VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}


def clip_model(kind: type) -> nn.Module:
    """A whole CLIP model whose text tower has the sizes of "tiny", in float64."""
    sizes = dict(TEXT_TOWERS["tiny"].sizes)
    torch.manual_seed(3)
    return kind(sizes.pop("output_dim"), SMALL_VISION, sizes).double().eval()


@pytest.fixture(scope="module")
def tower() -> TextTower:
    torch.manual_seed(1)
    return TextTower("tiny", "random").double()


@mark.parametrize("kind", ["CLIP", "CustomTextCLIP"])  # text parts at the top, or below "text."
@mark.parametrize("end", ["safetensors", "pt"])
def test_texts_are_encoded_as_by_the_whole_clip_model(tmp_path, kind, end):
    whole, path = clip_model(getattr(open_clip, kind)), tmp_path / f"clip.{end}"
    state = {name: value.float() for name, value in whole.state_dict().items()}
    if end == "pt":
        torch.save({"module": state}, path)
    else:
        save_file(state, path)
    tower = TextTower("tiny", str(path)).double()
    whole.load_state_dict(state)
    expected = whole.encode_text(tower.tokenize(TEXTS))
    torch.testing.assert_close(tower.encode_texts(TEXTS), expected, rtol=1e-12, atol=1e-12)


def test_embedded_tokens_may_be_cut_behind_the_end_and_learned_before_it(tower):
    tokens = tower.tokenize(TEXTS)
    ends = tower.ends(tokens)
    assert tokens.shape == (3, 77) and ends.tolist() == [2, 3, 7]
    embedded = tower.embed(tokens)
    assert embedded.shape == (3, 77, tower.width)
    whole = tower.encode_texts(TEXTS)
    assert whole.shape == (3, tower.dim) and whole.dtype == torch.float64
    torch.testing.assert_close(tower.encode(embedded[:, :8], ends), whole)
    prompt = embedded[:, :8].clone().requires_grad_()
    tower.encode(prompt, ends)[0].sum().backward()
    moved = prompt.grad.abs().sum(-1) > 0
    assert moved[0].tolist() == [True] * 3 + [False] * 5 and not moved[1:].any()


@mark.parametrize(
    "name, count, width, dim",
    [
        ("eva02_clip_vitl", 123_650_304, 768, 768),
        ("eva02_clip_vitl_336", 123_650_304, 768, 768),
        ("convnext_clip_large", 152_001_792, 768, 768),
    ],
)
def test_sizes_of_the_public_towers(name, count, width, dim):
    with torch.device("meta"):
        tower = TextTower(name, "random")
    assert sum(p.numel() for p in tower.parameters()) == count
    assert (tower.width, tower.dim, tower.context_length) == (width, dim, 77)
    model = TEXT_TOWERS[name]
    assert open_clip.get_pretrained_cfg(model.open_clip_name, model.tag)["hf_hub"]
    assert tower.tokenize(["road"])[0, :3].tolist() == [49406, 1759, 49407]


def test_a_tower_is_never_random_in_silence(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.WARNING):
        TextTower("tiny", "random")
    assert "keeps its random initialisation" in caplog.text
    with raises(ValueError, match="tiny has no public weights"):
        TextTower("tiny")
    with raises(FileNotFoundError, match="no weights file .*Set MODEL.TEXT.WEIGHTS"):
        TextTower("tiny", str(tmp_path / "none.pt"))

    class Unreachable:
        def model_info(self, repo, timeout):
            raise ConnectionError("no route to the hub")

    monkeypatch.setattr(text_tower, "HfApi", Unreachable)
    monkeypatch.setattr(text_tower, "try_to_load_from_cache", lambda *args: None)
    with torch.device("meta"), raises(RuntimeError, match="no route.*EVA02_CLIP_L_336_psz14_s6B"):
        TextTower("eva02_clip_vitl_336")


def test_the_cache_of_the_hub_is_read_without_a_network(tmp_path, monkeypatch):
    whole = clip_model(open_clip.CLIP).float()
    save_file(whole.state_dict(), tmp_path / "open_clip_model.safetensors")
    asked = []

    def cache(repo, file):
        asked.append((repo, file))
        return str(tmp_path / file)

    monkeypatch.setattr(text_tower, "try_to_load_from_cache", cache)
    public = TEXT_TOWERS["convnext_clip_large"]
    model = text_tower.TextModel("", public.tag, "", "", TEXT_TOWERS["tiny"].sizes)
    monkeypatch.setitem(TEXT_TOWERS, "tiny", model)
    monkeypatch.setattr(open_clip, "get_pretrained_cfg", lambda name, tag: {"hf_hub": "a/b/"})
    tower = TextTower("tiny")
    assert asked == [("a/b", "open_clip_model.safetensors")]
    assert torch.equal(tower.text.text_projection, whole.text_projection)


@mark.parametrize(
    "change, words",
    [
        (
            lambda state: state.pop("text.ln_final.bias"),
            r"has \d+ of \d+ tensors.*wrong shape: ln_final.bias",
        ),
        (lambda state: state.update({"text.extra": torch.ones(1)}), "Unexpected: extra"),
        (
            lambda state: state.update({"text.text_projection": torch.ones(32, 8)}),
            "wrong shape: text_projection",
        ),
        (
            lambda state: state.update({"text.ln_final.bias": torch.full((32,), torch.nan)}),
            "NaN or infinity.*MODEL.TEXT.WEIGHTS",
        ),
    ],
)
def test_a_file_loads_as_a_whole_or_not_at_all(tmp_path, change, words):
    state = clip_model(open_clip.CustomTextCLIP).float().state_dict()
    change(state)
    save_file(state, tmp_path / "clip.safetensors")
    with raises(ValueError, match=words):
        TextTower("tiny", str(tmp_path / "clip.safetensors"))


def test_a_missing_open_clip_is_named_with_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    with raises(ImportError, match=r"pip install 'fishertune-d2\[text\]'"):
        TextTower("tiny", "random")


def test_unknown_names_and_long_texts_are_refused(tower):
    with raises(ValueError, match="MODEL.TEXT.NAME is 'small'; known are eva02_clip_vitl,"):
        TextTower("small", "random")
    tower.tokenize(["road " * 75])
    with raises(ValueError, match="more than 75 tokens"):
        tower.tokenize(["road " * 76])


def test_no_stage_trains_a_tower(tower):
    assert not tower.train().training and not tower.text.training
    model = nn.ModuleDict({"backbone": nn.Linear(2, 2), "sem_seg_head": nn.Linear(2, 2)})
    model["sem_seg_head"].tower = tower
    assert frozen_parameters(model) == {*tower.parameters()}
    prepare_stage(model, "warmup", TUNING_REGISTRY.get("freeze")(None), None)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"sem_seg_head.weight", "sem_seg_head.bias"}


def test_class_names_are_those_of_the_config_or_of_the_data_set():
    MetadataCatalog.get("named_classes").set(stuff_classes=["road", "traffic_light"])
    try:
        assert class_names([], "named_classes", 2) == ["road", "traffic light"]
        assert class_names(["a", "b", "c"], "named_classes", 3) == ["a", "b", "c"]
        with raises(ValueError, match=r"named_classes \(stuff_classes\) has 2 names.*is 3: set"):
            class_names([], "named_classes", 3)
        with raises(ValueError, match="MODEL.TEXT.CLASSES has 1 names"):
            class_names(["a"], "named_classes", 3)
        with raises(ValueError, match="MODEL.TEXT.CLASSES has 0 names"):
            class_names([], "", 3)
    finally:
        MetadataCatalog.remove("named_classes")
