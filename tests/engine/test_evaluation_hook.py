"""model_best.pth is the checkpoint of the highest mIoU on the data set that TEST.BEST_ON names."""

from pathlib import Path

import pytest
import torch

from fishertune_d2.engine import Trainer

from .conftest import final_state, same_states, train

ON = {"TEST__BEST_ON": "tiny_day", "TEST__EVAL_PERIOD": 2}


@pytest.fixture
def scores(monkeypatch):
    """Returns a function that sets the mIoU by iterations done, of tiny_day; tiny_night is 99."""
    given: dict[int, float] = {}

    def evaluate(self: Trainer) -> dict:
        done = min(self.iter + 1, self.max_iter)
        return {
            "tiny_day": {"sem_seg": {"mIoU": given[done]}},
            "tiny_night": {"sem_seg": {"mIoU": 99.0}},
        }

    monkeypatch.setattr(Trainer, "_evaluate", evaluate)
    return given.update


def _best(cfg) -> dict:
    return torch.load(Path(cfg.OUTPUT_DIR, "model_best.pth"), weights_only=True)


def test_the_best_of_the_middle(tiny_cfg, scores):
    scores({2: 50.0, 4: 60.0, 6: 55.0, 7: 60.0})
    cfg = tiny_cfg(**ON)
    train(cfg)
    best, then = _best(cfg), torch.load(Path(cfg.OUTPUT_DIR, "model_0000003.pth"))
    assert best["iteration"] == 3 and same_states(best["model"], then["model"])
    assert Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text() == "model_final.pth"


def test_the_best_at_the_end(tiny_cfg, scores):
    scores({2: 50.0, 4: 60.0, 6: 55.0, 7: 60.1})
    cfg = tiny_cfg(**ON)
    train(cfg)
    assert _best(cfg)["iteration"] == 6
    assert same_states(_best(cfg)["model"], final_state(cfg.OUTPUT_DIR)["model"])


@pytest.mark.parametrize("stop", [4, 5])
def test_a_resumed_run_knows_the_best(tiny_cfg, scores, stop):
    scores({2: 50.0, 4: 60.0, 6: 55.0, 7: 58.0})
    cfg = tiny_cfg(**ON)
    train(cfg, stop=stop)
    train(cfg, resume=True)
    assert _best(cfg)["iteration"] == 3


def test_a_checkpoint_names_the_hook_as_it_was_called(tiny_cfg, scores):
    scores({2: 50.0, 4: 60.0, 6: 55.0, 7: 58.0})
    cfg = tiny_cfg(**ON)
    train(cfg, stop=5)
    last = Path(cfg.OUTPUT_DIR, Path(cfg.OUTPUT_DIR, "last_checkpoint").read_text())
    state = torch.load(last, weights_only=True)
    states = state["trainer"]["hooks"]
    states["BestCheckpoint"] = {"best": states.pop("Evaluation")["best"]}
    torch.save(state, last)
    train(cfg, resume=True)
    assert _best(cfg)["iteration"] == 3


@pytest.mark.parametrize("change", [{}, {"TEST__BEST_ON": "tiny_night"}])
def test_the_best_of_another_run_does_not_count(tiny_cfg, scores, change):
    scores({2: 99.5, 4: 60.0, 6: 55.0, 7: 58.0})
    train(tiny_cfg(**ON))
    warmup = str(Path(tiny_cfg().OUTPUT_DIR, "model_warmup.pth"))
    cfg = tiny_cfg("other", TUNING__WARMUP_CHECKPOINT=warmup, **ON | change)
    train(cfg)
    assert _best(cfg)["iteration"] == 3


def test_another_data_set_starts_anew(tiny_cfg, scores):
    scores({2: 99.5, 4: 60.0, 6: 55.0, 7: 58.0})
    cfg = tiny_cfg(**ON)
    train(cfg, stop=3)
    train(tiny_cfg(**ON | {"TEST__BEST_ON": "tiny_night"}), resume=True)
    assert _best(cfg)["iteration"] == 3


def test_by_default_none_is_kept(tiny_cfg, scores):
    scores({4: 60.0, 7: 60.1})
    cfg = tiny_cfg(TEST__EVAL_PERIOD=4)
    train(cfg)
    assert not Path(cfg.OUTPUT_DIR, "model_best.pth").exists()


def test_the_scores_of_the_real_evaluation_count(tiny_cfg):
    cfg = tiny_cfg(**ON | {"TEST__BEST_ON": "tiny_night"})
    trainer = train(cfg)
    scores = [score for score, _ in trainer.storage.history("tiny_night/sem_seg/mIoU").values()]
    assert len(scores) == 4 and max(scores) > 0
    assert _best(cfg)["iteration"] == [1, 3, 5, 6][scores.index(max(scores))]


@pytest.mark.parametrize("change", [{"TEST__BEST_ON": "tiny_dusk"}, {"TEST__EVAL_PERIOD": 0}])
def test_a_best_that_is_never_scored_is_refused(tiny_cfg, change):
    with pytest.raises(ValueError, match="name a data set of DATASETS.TEST, and a period above 0"):
        train(tiny_cfg(**ON | change))
