"""Every shipped config reads, and the paper's counts what the paper counts."""

from pathlib import Path

import pytest
from detectron2.engine import HookBase
from safetensors.torch import load_file

from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer, log_plan
from fishertune_d2.engine.checkpoint import PERIODIC
from fishertune_d2.plan import make_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


def _read(path: Path):
    cfg = default_config()
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


class _Weigh(HookBase):
    """What the trainer holds after the last step, in bytes; of a selection, the most of all steps.

    As soon as all of it is tuned, some of it is let go.
    """

    selection = 0

    def after_step(self) -> None:
        trainer = self.trainer
        trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
        state = trainer.optimizer.state_dict()["state"].values()
        self.gradients = sum(p.grad.nbytes for p in trained)
        self.optimizer = sum(each.nbytes for moments in state for each in moments.values())
        model = [*trainer.segmentor.parameters(), *trainer.segmentor.buffers()]
        self.model = sum(each.nbytes for each in model)
        tensors = trainer._selected.extra_tensors() if trainer._selected else []
        self.selection = max(self.selection, sum(each.nbytes for each in tensors))


FISHERTUNE = {
    "TUNING__METHOD": "fishertune",
    "TUNING__STEPS": "fisher",
    "TEST__BEST_ON": "tiny_day",
    "SOLVER__KEEP_CHECKPOINTS": 2,
    "TEST__EVAL_PERIOD": 3,
}
FULL = {"TUNING__METHOD": "full", "SOLVER__KEEP_CHECKPOINTS": 0, "TEST__EVAL_PERIOD": 7}


@pytest.mark.parametrize(("options", "expected"), [(FISHERTUNE, 3), (FULL, 1)])
def test_a_run_holds_and_writes_what_was_planned(tiny_cfg, options, expected, monkeypatch):
    cfg = tiny_cfg(**options)
    method, keep = cfg.TUNING.METHOD, cfg.SOLVER.KEEP_CHECKPOINTS
    evaluations, scores = [], {"tiny_day": {"sem_seg": {"mIoU": 30.0}}}
    monkeypatch.setattr(Trainer, "test", lambda *_: evaluations.append(1) or scores)
    plan = make_plan(cfg)
    planned = {stage.name: stage.memory for stage in plan.stages}["tuning"]
    trainer, weighed = Trainer(cfg), _Weigh()
    trainer.register_hooks([weighed])
    trainer.train()

    assert planned.gradients == weighed.gradients
    # A tensor of which nothing is selected is not in the optimizer; the plan spreads evenly.
    assert planned.optimizer == pytest.approx(weighed.optimizer, rel=1e-3)
    assert planned.weights + planned.selection == weighed.model + weighed.selection
    assert (planned.selection > 0) == (method == "fishertune")

    assert plan.evaluations == len(evaluations) == expected
    files = {"model_final.pth", "model_warmup.pth", PERIODIC}
    if method == "fishertune":
        files |= {"fisher.safetensors", "selection.safetensors", "model_best.pth"}
    assert plan.files.keys() == files
    out = Path(cfg.OUTPUT_DIR)
    for path in out.glob("*.safetensors"):
        assert sum(each.nbytes for each in load_file(path).values()) == plan.files[path.name]
    assert (out / "model_best.pth").exists() == ("model_best.pth" in files)
    tensors = 4 * len(list(trainer.segmentor.parameters()))  # two moments, and a count of steps
    assert plan.kept == len(list(out.glob(PERIODIC))) == (keep or cfg.SOLVER.MAX_ITER)
    for name, size in plan.files.items():
        # Beside the numbers, a file holds names, shapes and paddings.
        found = [path.stat().st_size for path in out.glob(name)]
        assert 0 < sum(found) - size < 400 * tensors * len(found)
