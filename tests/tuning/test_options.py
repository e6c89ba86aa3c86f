"""A method names the groups of TUNING that it reads; a run's record leaves the others out."""

import pytest
from detectron2.config import CfgNode

from fishertune_d2.config import default_config
from fishertune_d2.tuning import TUNING_REGISTRY, build_tuning_method


@pytest.mark.parametrize("name", [name for name, _ in TUNING_REGISTRY])
def test_a_method_reads_no_group_of_keys_that_it_does_not_name(name, monkeypatch):
    cfg = default_config()
    cfg.TUNING.METHOD = name
    groups = {key: node for key, node in cfg.TUNING.items() if isinstance(node, CfgNode)}
    read = set()
    look = CfgNode.__getattr__

    def recorded(node: CfgNode, key: str):
        read.update(group for group, own in groups.items() if own is node)
        return look(node, key)

    monkeypatch.setattr(CfgNode, "__getattr__", recorded)
    method = build_tuning_method(cfg)
    assert method.options is not None
    assert read <= set(method.options) <= set(groups)
