"""The README's example of one's own data, as a reader would run it."""

import re
from pathlib import Path

import numpy as np
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from fishertune_d2.data import check_datasets, load_datasets

README = Path(__file__).resolve().parents[1] / "README.md"


def test_own_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    for folder in ("my_city", "night"):
        for part, pixels in (("images", (4, 6, 3)), ("labels", (4, 6))):
            (tmp_path / folder / part).mkdir(parents=True)
            picture = Image.fromarray(np.full(pixels, 2, dtype=np.uint8))
            picture.save(tmp_path / folder / part / "a.png")
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    names = ["my_city", "my_city_at_night"]
    try:
        exec(compile(example, "README.md", "exec"), {})
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
