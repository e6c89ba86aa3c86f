"""datasets/README.md agrees with the table of data sets."""

import inspect
import re
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fishertune_d2.data import class_counts, dataset_metadata, register_sem_seg
from fishertune_d2.data.dataset_dicts import load_datasets
from fishertune_d2.data.dataset_table import DATASETS

README = (Path(__file__).resolve().parents[2] / "datasets/README.md").read_text()
TABLE = {
    cells[0].strip("`"): cells[1:]
    for cells in (
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in README.partition("## All names")[2].partition("\n## ")[0].splitlines()
        if line.startswith("| `")
    )
}


def test_the_readme_has_every_data_set_and_no_other():
    assert list(TABLE) == [dataset.name for dataset in DATASETS]


@pytest.mark.parametrize("dataset", DATASETS, ids=lambda d: d.name)
def test_the_readmes_numbers_are_the_tables(dataset):
    sizes = ", ".join(f"{width}x{height}" for width, height in dataset.published.sizes)
    test_size = "x".join(map(str, dataset.test_size)) if dataset.test_size else "file"
    assert TABLE[dataset.name] == [
        f"{dataset.published.pairs:,}",
        sizes or "varied",
        test_size,
        dataset.label_map,
        dataset.domain,
    ]


@pytest.mark.parametrize(
    "dataset",
    [d for d in DATASETS if "streets" not in d.name],
    ids=lambda d: d.name,
)
def test_the_readme_shows_every_tree(dataset):
    top = dataset.image_dir.split("/")[0]
    trees = re.findall(r"```\n(.*?)```", README, flags=re.DOTALL)
    (tree,) = [text for text in trees if text.startswith(f"{top}/")]
    words = set(re.findall(r"\w+", tree))
    for folder in (dataset.image_dir, dataset.label_dir):
        parts = [part.removesuffix("annot") for part in folder.split("/") if "*" not in part]
        assert set(parts) <= words
    assert all(suffix in tree for suffix in dataset.label_suffixes)


def test_the_example_of_own_data_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("photos/day1", "masks/day1"):
        (tmp_path / "harbour" / folder).mkdir(parents=True)
    Image.new("RGB", (6, 4)).save(tmp_path / "harbour/photos/day1/7_rgb.jpg")
    ids = np.array([[0, 1, 2, 255, 0, 0]] * 4, dtype=np.uint8)
    Image.fromarray(ids).save(tmp_path / "harbour/masks/day1/7_mask.png")
    try:
        _run_example("register_sem_seg")
        assert [item["image_id"] for item in load_datasets(["harbour"])] == ["day1/7"]
    finally:
        DatasetCatalog.remove("harbour")
        MetadataCatalog.remove("harbour")


def test_the_example_of_data_that_detectron2_registers_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    ids = np.array([[0, 1, 1, 255, 0, 0]] * 4, dtype=np.uint8)
    for part in ("train", "val"):
        for kind, pixels, ending in (
            ("photos", np.stack([ids] * 3, 2), "jpg"),
            ("masks", ids, "png"),
        ):
            (tmp_path / "park" / kind / part).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / f"park/{kind}/{part}/7.{ending}")
    try:
        _run_example("load_sem_seg")
        assert class_counts(["park_train", "park_val"]).tolist() == [[12, 8, 4]] * 2
        known = [dataset_metadata(name) for name in ("park_train", "park_val")]
        assert [(each.classes, each.domain) for each in known] == [(("path", "lawn"), "park")] * 2
    finally:
        for name in ("park_train", "park_val"):
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


def _run_example(about: str) -> None:
    """Executes the one example that mentions ``about``."""
    examples = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    (example,) = [text for text in examples if about in text]
    exec(compile(example, "datasets/README.md", "exec"), {})


def test_the_defaults_that_the_readme_names():
    (dataset,) = re.findall(r"end in `(\S+)`, `(\S+)` or `(\S+)`, and labels in `(\S+)`\.", README)
    signature = inspect.signature(register_sem_seg).parameters
    assert dataset == (*signature["image_suffixes"].default, signature["label_suffix"].default)
    table = README.partition("| argument | for |\n|---|---|\n")[2].partition("\n\n")[0]
    cells = [line.split(" | ")[0] for line in table.splitlines()]
    named = {name for cell in cells for name in re.findall(r"`(\w+)`", cell)}
    assert named == {name for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
