"""The log of a run starts with the run, holds no colours, and its numbers go to every writer."""

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from detectron2.engine import default_argument_parser
from detectron2.utils.events import EventStorage

from fishertune_d2.engine.run_logs import set_up
from fishertune_d2.engine.writers import WandbWriter, build_writers

from .conftest import train


@pytest.fixture
def log(tiny_cfg):
    """The text of log.txt after the set-up of a run and a message in colours."""
    cfg = tiny_cfg()
    words = ["--config-file", "configs/demo.yaml", "--resume", "SEED", "3"]
    set_up(cfg, default_argument_parser().parse_args(words))
    logging.getLogger("detectron2.checkpoint").warning("\x1b[34mhead.weight\x1b[0m is missing")
    return Path(cfg.OUTPUT_DIR, "log.txt").read_text()


def test_the_first_lines_name_the_command_and_the_file_of_the_config(log):
    first, second = log.splitlines()[:2]
    assert "configs/demo.yaml SEED 3, --resume, 1 process(es) on cpu" in first
    assert "The full config is in" in second
    assert Path(second.rpartition("is in ")[2]).read_text().startswith("CUDNN_BENCHMARK")
    assert log.count("Environment info:\n") == 1  # read by fishertune_d2.report


def test_the_file_holds_no_codes_of_colours(log):
    assert "WARNING: head.weight is missing" in log
    assert "\x1b" not in log


def test_the_console_names_the_stage_beside_the_time_left(tiny_cfg, caplog):
    caplog.set_level(logging.INFO, "detectron2.utils.events")
    train(tiny_cfg(SOLVER__MAX_ITER=24, TUNING__WARMUP_ITERS=21, DATASETS__TEST=()))
    lines = [r.getMessage() for r in caplog.records if " iter: " in r.getMessage()]
    assert [line.split("stage: ")[1].split()[0] for line in lines] == ["warmup", "tuning"]


class _Wandb:
    """What the writer calls of wandb; ``entries`` are the numbers of all runs, by id and step."""

    def __init__(self):
        self.entries, self.finished = {}, 0

    def init(self, *, id, **options):
        name, self.options = id or f"new{len(self.entries)}", options
        numbers = self.entries.setdefault(name, {})
        return SimpleNamespace(
            id=name,
            log=lambda values, step: numbers.setdefault(step, {}).update(values),
            finish=lambda: setattr(self, "finished", self.finished + 1),
        )


def test_weights_and_biases_gets_the_numbers_of_metrics_json(tiny_cfg, monkeypatch):
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    cfg = tiny_cfg(WANDB_PROJECT="cities", DATASETS__TEST=())
    train(cfg)
    lines = Path(cfg.OUTPUT_DIR, "metrics.json").read_text().splitlines()
    expected = {line.pop("iteration"): line for line in map(json.loads, lines)}
    assert fake.entries == {"new0": expected} and fake.finished == 1
    assert fake.options["project"] == "cities"
    assert fake.options["config"]["TUNING"]["METHOD"] == "fishertune"
    WandbWriter(cfg)  # of a resumed run
    assert list(fake.entries) == ["new0"]


def test_without_wandb_the_error_names_the_key_and_the_extra(tiny_cfg, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    cfg = tiny_cfg(WANDB_PROJECT="cities")
    with pytest.raises(ImportError, match=r"WANDB_PROJECT is 'cities'.*fishertune-d2\[wandb\]"):
        build_writers(cfg, lambda: "warmup")


def test_the_smoothed_losses_are_those_of_the_console(tiny_cfg, monkeypatch):
    fake = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    Path(tiny_cfg().OUTPUT_DIR).mkdir(exist_ok=True)
    writer = WandbWriter(tiny_cfg(WANDB_PROJECT="cities"))
    with EventStorage() as storage:
        for loss in (1.0, 5.0, 3.0):
            storage.put_scalar("total_loss", loss)
            storage.step()
        writer.write()
        writer.write()  # nothing is new
    assert fake.entries["new0"] == {2: {"total_loss": 3.0}}  # the median
