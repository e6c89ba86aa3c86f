"""The README's examples, as a reader would run them."""

import re
from pathlib import Path

import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image
from safetensors.torch import save_file

from fishertune_d2.data import check_datasets, load_datasets
from fishertune_d2.export import Architecture, Delta
from fishertune_d2.modeling import VFMBackbone

README = Path(__file__).resolve().parents[1] / "README.md"


def _run_example(about: str, **variables) -> dict:
    """Executes the one example that mentions ``about``; returns its variables."""
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    (example,) = [text for text in examples if about in text]
    exec(compile(example, "README.md", "exec"), variables)
    return variables


def test_without_detectron2():
    variables = _run_example("estimate_fisher")
    chosen = sum(int(mask.sum()) for mask in variables["masks"].values())
    assert chosen == int(0.05 * variables["base"])


def test_export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    public = VFMBackbone(name="tiny", weights="random", img_size=(160, 160), patch_size=16).vit
    save_file(public.state_dict(), "public.safetensors")
    tuned = {name: tensor.clone() for name, tensor in public.state_dict().items()}
    tuned["blocks.0.attn.qkv.weight"][3] += 1
    pixels = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    architecture = Architecture("tiny", "test_vit", (160, 160), 16, *pixels)
    Delta.between(public.state_dict(), tuned, architecture).save("delta.safetensors")
    variables = _run_example("apply_delta", model=public)
    for vit in (variables["backbone"].vit, public):
        assert all(torch.equal(tensor, tuned[name]) for name, tensor in vit.state_dict().items())


def test_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    for folder in ("my_city", "night"):
        for part, pixels in (("images", (4, 6, 3)), ("labels", (4, 6))):
            (tmp_path / folder / part).mkdir(parents=True)
            picture = Image.fromarray(np.full(pixels, 2, dtype=np.uint8))
            picture.save(tmp_path / folder / part / "a.png")
    names = ["my_city", "my_city_at_night"]
    try:
        _run_example("register_sem_seg")
        check_datasets(names, num_classes=3)
        assert [Path(item["file_name"]).parts[-3] for item in load_datasets(names)] == [
            "my_city",
            "night",
        ]
        assert MetadataCatalog.get("my_city").stuff_classes == ["road", "building", "sky"]
    finally:
        for name in names:
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)
