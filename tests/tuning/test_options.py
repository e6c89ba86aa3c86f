"""A method names the groups of TUNING that it reads; a run's record leaves out the others."""

import pytest
from detectron2.config import CfgNode

from fishertune_d2.config import default_config
from fishertune_d2.engine.run_record import RunRecord
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


def test_a_run_with_the_former_name_of_a_schedule_is_the_same_run():
    def record(schedule: str) -> RunRecord:
        cfg = default_config()
        cfg.TUNING.METHOD, cfg.TUNING.SCHEDULE = "fishertune", schedule
        return RunRecord.of_run(cfg, None, None)

    former, now = record("text"), record("growing")
    assert former.config["TUNING.SCHEDULE"] == "text"  # as in a checkpoint of that time
    now.require_same_run(RunRecord.of_state(former.state_dict()))
    former.require_same_run(now)
    with pytest.raises(ValueError, match="TUNING.SCHEDULE was 'linear' and is 'growing'"):
        now.require_same_run(record("linear"))
