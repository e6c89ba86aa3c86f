"""The documents' examples in Python, as a reader would run them."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from fishertune_d2.export import Architecture, Delta
from fishertune_d2.modeling import VFMBackbone

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _run_example(page: str, about: str, **variables) -> dict:
    """Executes the one example of a page that mentions ``about``; returns its variables."""
    examples = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    (example,) = [text for text in examples if about in text]
    exec(compile(example, page, "exec"), variables)
    return variables


def test_without_detectron2():
    short = _run_example("reuse.md", "fisher.select(")
    base = sum(p.numel() for p in short["model"].parameters())
    assert sum(int(mask.sum()) for mask in short["masks"].values()) == int(0.05 * base)
    parts = _run_example("reuse.md", "estimate_fisher", **short)
    assert parts["selection"].count(0.05) == int(0.05 * base)


def test_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = VFMBackbone(name="tiny", weights="random", img_size=(160, 160), patch_size=16).vit
    save_file(public.state_dict(), "public.safetensors")
    tuned = {name: tensor.clone() for name, tensor in public.state_dict().items()}
    tuned["blocks.0.attn.qkv.weight"][3] += 1
    pixels = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    architecture = Architecture("tiny", "test_vit", (160, 160), 16, *pixels)
    Delta.between(public.state_dict(), tuned, architecture).save("delta.safetensors")
    variables = _run_example("export.md", "apply_delta", model=public)
    for vit in (variables["backbone"].vit, public):
        assert all(torch.equal(tensor, tuned[name]) for name, tensor in vit.state_dict().items())


def test_how_far_other_kernels_move_a_number(monkeypatch):
    monkeypatch.chdir(DOCS.parent)
    variables = _run_example("results/tables.md", "other_kernels")
    sizes, largest = variables["sizes"].values(), max(variables["sizes"].values())
    page = " ".join((DOCS / "results/tables.md").read_text().split())
    assert f"moved by {sum(sizes) / len(sizes):.1f} points, at most by {largest:.1f} (" in page


def test_how_far_fishertune_is_ahead_with_each_seed(monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    _run_example("results/selection.md", "without 42")
    page = (DOCS / "results/selection.md").read_text()
    assert capsys.readouterr().out in page


def test_how_far_fishertune_is_from_full_fine_tuning(monkeypatch, capsys):
    monkeypatch.chdir(DOCS.parent)
    _run_example("results/tables.md", "paired_difference")
    lines = (DOCS / "results/tables.md").read_text().splitlines()
    said = capsys.readouterr().out.splitlines()
    assert said
    assert not {*said} - {*lines}
