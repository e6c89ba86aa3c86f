"""Each example, shortened: what it says has moved has moved, and nothing else has."""

import importlib
import math
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer

from fishertune_d2.analysis.selection_map import draw_run

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


@pytest.fixture(autouse=True)
def every_test_on_one_thread(one_thread):
    """Applies to all tests of this folder."""


@pytest.fixture
def main(request, monkeypatch):
    """The main function of an example."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module(request.param).main
    if "shapes" in DatasetCatalog:
        DatasetCatalog.remove("shapes")
        MetadataCatalog.remove("shapes")


@pytest.mark.parametrize(
    ("main", "backbone"),
    [
        ("vitdet_mask_rcnn", "backbone.net."),
        ("simple_trainer", "backbone."),
        ("timm_classifier", ""),
    ],
    indirect=["main"],
)
def test_of_the_backbone_the_selected_weights_move_and_no_others(main, backbone, capsys):
    before, model, selection, losses = main(max_iter=8)
    assert len(losses) == 8 and all(map(math.isfinite, losses))
    masks = {backbone + name: mask for name, mask in selection.masks(selection.share).items()}
    selected = moved = rest = rest_moved = 0
    for name, parameter in model.named_parameters():
        changed = parameter.detach() != before[name]
        if name.startswith(backbone) and not name.startswith("head."):
            mask = masks.get(name, torch.zeros_like(changed))
            assert not changed[~mask].any(), name
            selected, moved = selected + int(mask.sum()), moved + int(changed[mask].sum())
        else:
            rest, rest_moved = rest + changed.numel(), rest_moved + int(changed.sum())
    assert selected == int(0.05 * selection.base)
    assert moved > 0.99 * selected
    assert rest_moved > 0.99 * rest > 0
    printed = capsys.readouterr().out.replace(",", "").split()
    for number in (selected, selection.base - selected, rest):
        assert str(number) in printed


@pytest.mark.parametrize("page", ["README.md", "docs/reuse.md"])
def test_the_call_on_a_page_works(page, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    example = importlib.import_module("simple_trainer")
    blocks = re.findall(r"```python\n(.*?)```", (EXAMPLES.parent / page).read_text(), re.DOTALL)
    (block,) = [text for text in blocks if "apply_fishertune" in text]
    model = example.Classifier()
    head = model.head.weight.detach().clone()
    trainer = SimpleTrainer(
        model, example.draw_batches(0), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    data_loader = islice(example.draw_batches(1), 1)
    variables = {"max_iter": 2, "warmup": 1, "output_dir": tmp_path}
    exec(block, variables | {"trainer": trainer, "data_loader": data_loader})
    assert (model.head.weight != head).any()
    assert {path.name for path in tmp_path.iterdir()} == {
        "fisher.safetensors",
        "selection.safetensors",
    }
    assert draw_run(tmp_path).is_file()


def test_the_plain_loop_needs_no_detectron2():
    code = "import sys; sys.modules['detectron2'] = None; import timm_classifier as e; e.main(8)"
    environment = {"PYTHONPATH": f"{EXAMPLES.parent}:{EXAMPLES}", "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert run.returncode == 0, run.stderr.decode()
    assert b"backbone, selected" in run.stdout
