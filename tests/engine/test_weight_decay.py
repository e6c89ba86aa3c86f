"""The weight decay that falls: its numbers against torch's cosine, and the real trainer with it."""

from types import SimpleNamespace

import pytest
import torch
from detectron2.engine import HookBase
from torch import nn

from fishertune_d2.engine.hooks import WeightDecay

from .conftest import final_state, same_end, train


class _Decays(HookBase):
    """Keeps the decays of each iteration's groups."""

    def __init__(self):
        self.seen: dict[int, list[float]] = {}

    def before_step(self) -> None:
        groups = self.trainer.optimizer.param_groups
        self.seen[self.trainer.iter] = sorted({group["weight_decay"] for group in groups})


def test_the_decay_falls_as_torchs_cosine():
    decay, end, start, iters = 0.05, 1e-5, 3, 20
    groups = [
        {"params": [nn.Parameter(torch.ones(1))], "weight_decay": each} for each in (decay, 0)
    ]
    optimizer = torch.optim.AdamW(groups)
    hook = WeightDecay(start, iters, end / decay)
    hook.trainer = SimpleNamespace(iter=0, optimizer=optimizer)
    # The same function, of a learning rate.
    rates = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(rates, iters, eta_min=end)
    for iteration in range(start + iters + 1):
        hook.trainer.iter = iteration
        hook.before_step()
        found, without = (group["weight_decay"] for group in optimizer.param_groups)
        assert found == pytest.approx(rates.param_groups[0]["lr"], rel=1e-9)
        assert without == 0
        if iteration >= start:
            rates.step()
            cosine.step()
    assert found == pytest.approx(end)


# T1 = 3, T3 = 4.
FALLING = {
    "TUNING__METHOD": "soma",
    "TUNING__SOMA__RANK": 4,
    "SOLVER__WEIGHT_DECAY": 0.5,
    "SOLVER__WEIGHT_DECAY_END": 0.1,
    "DATASETS__TEST": (),
}


def test_the_trainer_lets_it_fall_and_resumes_exactly(tiny_cfg):
    decays, cfg = _Decays(), tiny_cfg(**FALLING)
    train(cfg, decays)
    falls = {3: 0.5, 4: 0.1 + 0.2 * (1 + 2**-0.5), 5: 0.3, 6: 0.1 + 0.2 * (1 - 2**-0.5)}
    for iteration, seen in decays.seen.items():
        # Norms and embeddings have none.
        assert seen == pytest.approx([0, falls.get(iteration, 0.5)])
    assert len(decays.seen) == 7
    stopped = tiny_cfg("stopped", **FALLING)
    train(stopped, stop=5)
    train(stopped, resumed := _Decays(), resume=True)
    assert resumed.seen == {i: decays.seen[i] for i in (5, 6)}
    assert same_end(stopped.OUTPUT_DIR, cfg.OUTPUT_DIR)
    plain = tiny_cfg("plain", **FALLING | {"SOLVER__WEIGHT_DECAY_END": None})
    train(plain, constant := _Decays())
    assert {tuple(seen) for seen in constant.seen.values()} == {(0, 0.5)}
    assert not same_end(plain.OUTPUT_DIR, cfg.OUTPUT_DIR)
    groups = final_state(plain.OUTPUT_DIR)["trainer"]["_trainer"]["optimizer"]["param_groups"]
    assert all("initial_weight_decay" not in group for group in groups)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (0.05, -0.1)])
def test_a_decay_that_cannot_fall_is_refused(tiny_cfg, start, end):
    cfg = tiny_cfg(SOLVER__WEIGHT_DECAY=start, SOLVER__WEIGHT_DECAY_END=end)
    with pytest.raises(
        ValueError, match="SOLVER.WEIGHT_DECAY_END is .*: choose an end of at least"
    ):
        train(cfg)
