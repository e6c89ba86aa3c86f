"""Every shipped config reads, and the paper's counts what the paper counts."""

from pathlib import Path

import pytest
from detectron2.config import get_cfg

from fishertune_d2 import add_fishertune_config
from fishertune_d2.engine import log_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _read(path: Path):
    cfg = get_cfg()
    add_fishertune_config(cfg)
    cfg.merge_from_file(str(path))
    return cfg


def test_the_papers_counts():
    counts = log_plan(_read(CONFIGS / "fishertune_dinov2.yaml"))
    # The paper counts DINOv2's mask token too, 1,024 numbers that segmentation does not use.
    assert counts["backbone_parameters"] == 304_199_680 - 1024
    assert counts["tuned_parameters"] == 15_209_932
    assert f"{counts['tuned_parameters'] / 1e6:.2f}" == "15.21"
    assert f"{counts['backbone_parameters'] / 1e6:.2f}" == "304.20"


@pytest.mark.parametrize(
    "path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIGS))
)
def test_every_config_builds_its_backbone_and_opens_with_its_manual(path):
    counts = log_plan(_read(path))
    assert 0 <= counts["tuned_parameters"] <= counts["backbone_parameters"]
    text = path.read_text()
    assert text.startswith(("# ", "_BASE_"))
