"""Files written whole or not at all; damaged and hostile ones are refused by name."""

import json
import os
import stat
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fishertune_d2.files import first_names, whole_file
from fishertune_d2.fisher import FisherEstimate, Selection

SHAPES = {"blocks.0.mlp.fc1.weight": [3, 4], "blocks.0.mlp.fc1.bias": [3]}
WEIGHT, BIAS = SHAPES


@pytest.fixture
def selection(tmp_path) -> Path:
    """A selection of 4 of 20 weights: three entries of the one tensor, one of the other."""
    torch.manual_seed(0)
    scores = {name: torch.rand(shape) for name, shape in SHAPES.items()}
    scores[BIAS][1] = 2.0
    Selection.from_scores(scores, 0.2, 20).save(tmp_path / "selection.safetensors")
    return tmp_path / "selection.safetensors"


@pytest.fixture
def estimate(tmp_path) -> Path:
    f, shifted = ({name: torch.rand(shape) for name, shape in SHAPES.items()} for _ in "ab")
    FisherEstimate(f, shifted, 0.3, 7).save(tmp_path / "fisher.safetensors")
    return tmp_path / "fisher.safetensors"


def _texts(file: Path) -> dict[str, str]:
    (length,) = struct.unpack("<Q", file.read_bytes()[:8])
    return json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]


def _rewrite(file: Path, tensors: dict | None = None, **texts: str) -> None:
    save_file(load_file(file) | (tensors or {}), file, metadata=_texts(file) | texts)


def _header(file: Path, **changes) -> dict[str, str]:
    return {"header": json.dumps(json.loads(_texts(file)["header"]) | changes)}


HOSTILE_TENSORS = {
    "entry -1 is selected": {f"indices/{WEIGHT}": torch.tensor([0, -1, 2])},
    "12 entries, and entry 12 is selected": {f"indices/{WEIGHT}": torch.tensor([0, 12, 2])},
    "an entry of .* is selected twice": {f"indices/{WEIGHT}": torch.tensor([5, 0, 5])},
    "indices of .* are torch.float32": {f"indices/{WEIGHT}": torch.tensor([0.0, 1.0, 2.0])},
    r"of shape \(3, 1\), not": {f"indices/{WEIGHT}": torch.tensor([[0], [1], [2]])},
    "has 2 indices and 3 ranks": {f"indices/{WEIGHT}": torch.tensor([0, 1])},
    "ranks of .* do not ascend": {f"ranks/{WEIGHT}": torch.tensor([2, 1, 3])},
    "not the numbers from 0 to 3": {f"ranks/{WEIGHT}": torch.tensor([1, 2, 9])},
    "ranks are not the numbers": {f"ranks/{WEIGHT}": torch.tensor([0, 1, 2])},  # 0 is the bias's
    "holds 3 entries, but a share of 0.2 of 20 is 4": {
        f"indices/{WEIGHT}": torch.tensor([0, 1]),
        f"ranks/{WEIGHT}": torch.tensor([1, 2]),
    },
    "tensors are not those of its header: extra": {"extra": torch.zeros(1)},
}


@pytest.mark.parametrize("trouble", HOSTILE_TENSORS)
def test_a_selection_with_hostile_tensors_is_refused_by_name(selection, trouble):
    _rewrite(selection, HOSTILE_TENSORS[trouble])
    with pytest.raises(ValueError, match=f"selection.safetensors cannot be used: .*{trouble}"):
        Selection.load(selection)


HOSTILE_HEADERS = {
    "its share is 1e[+]30, which is not in": {"share": 1e30},
    "its share is nan": {"share": float("nan")},
    "its share is '0.2'": {"share": "0.2"},
    "but a share of 0.9 of 20 is 18": {"share": 0.9},
    "its base is -20": {"base": -20},
    "its base is 100000000000000000": {"base": 10**17},
    "its base is True": {"base": True},
    "lacks the shapes": {"shapes": [3, 4]},
    r"the shape of .* is \[3, -4\]": {"shapes": {**SHAPES, WEIGHT: [3, -4]}},
    "the shape of .* is 'abc'": {"shapes": {**SHAPES, WEIGHT: "abc"}},
    "shapes hold .* weights, more than any": {"shapes": {**SHAPES, WEIGHT: [10**9, 10**9]}},
    "has 2 entries, and entry": {"shapes": {**SHAPES, WEIGHT: [2, 1]}},
    "tensors are not those of its header": {"shapes": {WEIGHT: [3, 4]}},
}


@pytest.mark.parametrize("trouble", HOSTILE_HEADERS)
def test_a_selection_with_a_lying_header_is_refused_by_name(selection, trouble):
    _rewrite(selection, **_header(selection, **HOSTILE_HEADERS[trouble]))
    with pytest.raises(ValueError, match=f"selection.safetensors cannot be used: .*{trouble}"):
        Selection.load(selection)


HOSTILE_TEXTS = {
    "its format is 'fishertune_selection_v2', not": {"format": "fishertune_selection_v2"},
    "Expecting value": {"header": "share: 0.2"},
    "its header is a list, where a dict": {"header": "[]"},
    "recursion": {"header": "[" * 100_000},
    "its notes is a str": {"notes": '"made by hand"'},
}


@pytest.mark.parametrize("trouble", HOSTILE_TEXTS)
def test_a_selection_of_another_version_or_with_broken_texts_is_refused(selection, trouble):
    _rewrite(selection, **HOSTILE_TEXTS[trouble])
    with pytest.raises(ValueError, match=f"selection.safetensors cannot be used: .*{trouble}"):
        Selection.load(selection)


HOSTILE_ESTIMATES = {
    "its format is 'fishertune_selection_v1'": ({}, {"format": "fishertune_selection_v1"}),
    "header lacks 'names'": ({}, {"nmaes": "[]"}),
    "not F.x. and F.x'. of the names": ({"other": torch.zeros(1)}, {}),
    "differ in shape": ({f"shifted/{BIAS}": torch.ones(4)}, {}),
    "is torch.int64, in which squares": ({f"f/{BIAS}": torch.ones(3, dtype=torch.int64)}, {}),
    f"f/{BIAS} holds negative or non-finite": ({f"f/{BIAS}": torch.tensor([1.0, -1.0, 0.0])}, {}),
    f"shifted/{BIAS} holds negative or": ({f"shifted/{BIAS}": torch.full((3,), torch.nan)}, {}),
    "its shift weight is 1.5, from 7": ({}, {"shift_weight": "1.5"}),
    "its shift weight is 0.3, from 0 images": ({}, {"images": "0"}),
    "its images is a float": ({}, {"images": "7.0"}),
}


@pytest.mark.parametrize("trouble", HOSTILE_ESTIMATES)
def test_a_hostile_estimate_is_refused_by_name(estimate, trouble):
    tensors, texts = HOSTILE_ESTIMATES[trouble]
    if "nmaes" in texts:
        kept = {key: text for key, text in _texts(estimate).items() if key != "names"}
        save_file(load_file(estimate), estimate, metadata=kept)
    else:
        _rewrite(estimate, tensors, **texts)
    with pytest.raises(ValueError, match=f"fisher.safetensors cannot be used: .*{trouble}"):
        FisherEstimate.load(estimate)


@pytest.mark.parametrize("kind", [Selection, FisherEstimate])
def test_a_file_truncated_anywhere_is_refused_by_name(kind, selection, estimate):
    file = selection if kind is Selection else estimate
    whole = file.read_bytes()
    for length in [0, 5, *range(8, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=f"{file.name} cannot be used"):
            kind.load(file)
    file.write_bytes(whole + b"more")
    with pytest.raises(ValueError, match=f"{file.name} cannot be used"):
        kind.load(file)
    file.write_bytes(whole)
    kind.load(file)
    with pytest.raises(FileNotFoundError, match="there is no file .*missing.safetensors"):
        kind.load(file.with_name("missing.safetensors"))


def test_a_header_that_lies_about_the_file_is_refused_by_name(selection):
    whole = selection.read_bytes()
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    first, second = header[f"indices/{WEIGHT}"], header[f"ranks/{WEIGHT}"]
    lies = [
        lambda: first.update(data_offsets=second["data_offsets"]),  # two tensors in one place
        lambda: first.update(data_offsets=[0, 10**12]),
        lambda: first.update(shape=[10**6]),
        lambda: first.update(dtype="F8"),
    ]
    selection.write_bytes(struct.pack("<Q", 2**60) + whole[8:])
    with pytest.raises(ValueError, match="selection.safetensors cannot be used: "):
        Selection.load(selection)
    for lie in lies:
        before = dict(first)
        lie()
        text = json.dumps(header).encode()
        selection.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        with pytest.raises(ValueError, match="selection.safetensors cannot be used: "):
            Selection.load(selection)
        first.clear()
        first.update(before)


def test_nothing_may_be_selected_of_a_tensor(tmp_path):
    scores = {"a": torch.zeros(2, 2), "b": torch.ones(2)}
    Selection.from_scores(scores, 0.2, 10).save(tmp_path / "selection.safetensors")
    loaded = Selection.load(tmp_path / "selection.safetensors")
    assert {name: len(places) for name, places in loaded.indices.items()} == {"a": 0, "b": 2}
    Selection.from_scores(scores, 0.0, 10).save(tmp_path / "none.safetensors")
    assert Selection.load(tmp_path / "none.safetensors").count(0.0) == 0


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    path.write_text("before")
    with whole_file(path) as temporary:
        temporary.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    with pytest.raises(KeyboardInterrupt), whole_file(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "after"


@pytest.fixture
def umask():
    """Sets the umask for the time of a test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize(("mask", "permissions"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_written_files_have_the_permissions_of_the_umask(
    tmp_path, umask, mask, permissions, selection, estimate
):
    """Safetensors gives its files to their owner alone, so that nobody else can use them."""
    umask(mask)
    Selection.load(selection).save(tmp_path / "new.safetensors")
    FisherEstimate.load(estimate).save(tmp_path / "new_fisher.safetensors")
    with whole_file(tmp_path / "private") as temporary:
        temporary.touch(0o600)
    Path(f"{tmp_path}/left.tmp").touch(0o600)  # of a run that was killed
    with whole_file(tmp_path / "left") as temporary, open(temporary, "w") as file:
        file.write("x")
    for name in ("new.safetensors", "new_fisher.safetensors", "private", "left"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == permissions, name


def test_a_full_disk_names_file_and_space_and_leaves_the_older_file(selection):
    before, loaded = selection.read_bytes(), Selection.load(selection)
    with pytest.raises(OSError, match=r"selection.safetensors could not .*MiB free") as failed:
        with whole_file(selection) as temporary:
            temporary.symlink_to("/dev/full")  # a disk on which every write fails
            temporary.write_bytes(b"x")
    assert "No space left on device" in str(failed.value)
    assert selection.read_bytes() == before
    assert [file.name for file in selection.parent.iterdir()] == [selection.name]
    with pytest.raises(OSError, match="gone/selection.safetensors could not be written"):
        loaded.save(selection.parent / "gone" / selection.name)


def test_a_long_list_names_its_first_and_counts_the_rest():
    assert first_names([]) == "none"
    assert first_names(["a", "b"], 2) == "a, b"
    assert first_names(["a", "b", "c", "d"], 2, separator="; ") == "a; b and 2 more"
