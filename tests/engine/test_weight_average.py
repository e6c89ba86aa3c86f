"""The average of the trained weights: its numbers, and the real trainer with it."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from detectron2.utils import comm
from torch import nn
from torch.multiprocessing import spawn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.engine.weight_average import WeightAverage
from fishertune_d2.run import Run

from .conftest import _register, final_state, make_cfg, on_one_thread, same_states, train


class Toy(nn.Module):
    """A trained and a frozen weight, in float64."""

    def __init__(self):
        super().__init__()
        self.trained = nn.Parameter(torch.randn(5, dtype=torch.float64))
        self.frozen = nn.Parameter(torch.randn(3, dtype=torch.float64), requires_grad=False)


def _hook(decay: float, model: nn.Module, start: int = 0) -> WeightAverage:
    hook = WeightAverage(decay, start)
    hook.trainer = SimpleNamespace(segmentor=model, iter=0, max_iter=100)
    return hook


def test_the_average_is_the_closed_form():
    torch.manual_seed(0)
    model, decay, steps = Toy(), 0.9, []
    hook = _hook(decay, model, start=2)
    others = None
    for iteration in range(12):
        with torch.no_grad():
            model.trained.copy_(torch.randn(5, dtype=torch.float64))
        hook.trainer.iter = iteration
        hook.after_step()
        if iteration < 2:
            assert hook.averages == {}
            continue
        steps.append(model.trained.detach().clone())
        if others is None:
            others = [steps[0].clone()]
        else:
            get_ema_multi_avg_fn(decay)(others, [model.trained], None)
    # The first weights stand for all before them: d^t w(0) + (1 - d) sum_k d^(t - k) w(k).
    last = len(steps) - 1
    expected = decay**last * steps[0]
    for k in range(1, last + 1):
        expected = expected + (1 - decay) * decay ** (last - k) * steps[k]
    assert hook.averages.keys() == {"trained"}
    torch.testing.assert_close(hook.averages["trained"], expected, rtol=1e-14, atol=1e-15)
    torch.testing.assert_close(others[0], expected, rtol=1e-14, atol=1e-15)


def test_a_weight_that_stays_is_its_average_to_the_bit():
    model = Toy()
    numbers = torch.tensor([-0.0, 0.0, 0.1, 1e-300, -3.7], dtype=torch.float64)
    with torch.no_grad():
        model.trained.copy_(numbers)
    hook = _hook(0.999, model)
    for _ in range(50):
        hook.after_step()
    assert torch.equal(hook.averages["trained"].view(torch.int64), numbers.view(torch.int64))


@pytest.fixture(scope="module", params=["fishertune", "full", "lora"])
def averaged(request, tmp_path_factory, tiny_data, tiny_head, device):
    """Runs with and without averages: their folders."""
    root = tmp_path_factory.mktemp(request.param)
    options = {**tiny_head, "MODEL.DEVICE": device, "TUNING.METHOD": request.param}
    with on_one_thread():
        train(make_cfg(root, options, "plain"))
        ended = train(make_cfg(root, options, "ema", SOLVER__EMA=0.9))
    return root / "plain", root / "ema", ended


def test_averages_change_no_trained_weight(averaged):
    plain, ema, ended = averaged
    states = [final_state(folder) for folder in (plain, ema)]
    trained = states[1]["trainer"]["hooks"]["WeightAverage"]
    assert trained
    assert same_states(trained, {name: states[0]["model"][name] for name in trained})
    model = states[1]["model"]
    assert list(model) == list(states[0]["model"])
    for name, tensor in model.items():
        same = torch.equal(tensor, states[0]["model"][name])
        assert same or name in trained, name
    assert any(not torch.equal(model[name], trained[name]) for name in trained)
    # The trainer ends with the averages, and scored them.
    assert same_states(ended.segmentor.state_dict(), model)


def test_the_averages_are_those_of_the_checkpoints(averaged):
    plain, ema, _ = averaged
    final = final_state(ema)
    names = final["trainer"]["hooks"]["WeightAverage"]
    expected = {}
    for iteration in range(3, 7):  # the tuning stage
        name = "model_final" if iteration == 6 else f"model_{iteration:07d}"
        state = torch.load(plain / f"{name}.pth", weights_only=True)["model"]
        for key in names:
            now = state[key].double()
            before = expected.get(key, now)
            expected[key] = 0.9 * before + 0.1 * now
    for key, value in expected.items():
        assert torch.allclose(final["model"][key].double(), value, rtol=1e-5, atol=1e-7), key


def test_weights_that_do_not_train_keep_their_bits(averaged):
    _, ema, ended = averaged
    masks = Run(ema).load_selection().masks(0.05) if ended.method.selects else {}
    start = torch.load(ema / "model_warmup.pth", weights_only=True)["model"]
    state = final_state(ema)
    final, trained = state["model"], state["trainer"]["hooks"]["WeightAverage"]
    same_names = start.keys() & final.keys()  # peft renames the layers that it wraps
    assert len(same_names) > 100
    for name in same_names:
        mask = masks.get(name.removeprefix("backbone."))
        kept = torch.full(start[name].shape, name not in trained) if mask is None else ~mask
        pairs = [each[name][kept].view(torch.int32) for each in (start, final)]
        assert torch.equal(*pairs), name


def test_results_say_it_and_a_scored_checkpoint_has_the_averages(averaged, tiny_cfg):
    plain, ema, ended = averaged
    assert json.loads((ema / "results.json").read_text())["protocol"]["ema"] == 0.9
    assert json.loads((plain / "results.json").read_text())["protocol"]["ema"] == 0.0
    cfg = ended.cfg
    model = build_trained(cfg, str(Path(cfg.OUTPUT_DIR, "model_final.pth")))
    assert same_states(model.state_dict(), ended.segmentor.state_dict())


@pytest.mark.parametrize("stop", [3, 5])
def test_a_resumed_run_has_the_same_averages(averaged, stop):
    _, ema, ended = averaged
    cfg = ended.cfg.clone()
    cfg.defrost()
    cfg.OUTPUT_DIR = str(ema.parent / f"stopped_{stop}")
    cfg.TEST.EVAL_PERIOD = 2  # the average is in the model while it is scored
    Path(cfg.OUTPUT_DIR).mkdir()
    train(cfg, stop=stop)
    train(cfg, resume=True)
    one, other = final_state(cfg.OUTPUT_DIR), final_state(ema)
    assert same_states(one["model"], other["model"])
    hooks = [state["trainer"]["hooks"]["WeightAverage"] for state in (one, other)]
    assert same_states(*hooks)


def test_an_average_may_begin_after_the_warm_up(tiny_cfg):
    late = {"SOLVER__EMA": 0.9, "SOLVER__EMA_START": 5, "DATASETS__TEST": ()}
    whole = tiny_cfg("whole", TUNING__METHOD="lora", **late)  # T1 = 3, T3 = 4
    train(whole)
    before, first, last = (
        torch.load(Path(whole.OUTPUT_DIR, f"{name}.pth"), weights_only=True)
        for name in ("model_0000004", "model_0000005", "model_final")
    )
    assert not before["trainer"].get("hooks", {}).get("WeightAverage")
    start, end = (each["trainer"]["hooks"]["WeightAverage"] for each in (first, last))
    assert start and same_states(start, {name: first["model"][name] for name in start})
    for name, weight in end.items():
        expected = 0.9 * start[name].double() + 0.1 * weight.double()
        assert torch.allclose(last["model"][name].double(), expected, rtol=1e-5, atol=1e-7), name
    for stop in (4, 6):
        parts = tiny_cfg(f"parts_{stop}", TUNING__METHOD="lora", **late)
        train(parts, stop=stop)
        train(parts, resume=True)
        assert same_states(final_state(parts.OUTPUT_DIR)["model"], last["model"])


@pytest.mark.parametrize("start", [-1, 7])
def test_an_average_that_never_begins_is_refused(tiny_cfg, start):
    with pytest.raises(ValueError, match="SOLVER.EMA_START is .* from 0 to below .*MAX_ITER, 7"):
        train(tiny_cfg(SOLVER__EMA=0.9, SOLVER__EMA_START=start))


@pytest.mark.parametrize("decay", [0.3, 1.0, -0.1])
def test_a_decay_that_averages_nothing_is_refused(tiny_cfg, decay):
    with pytest.raises(ValueError, match="SOLVER.EMA is .*: choose a decay from 0.5 to below 1"):
        train(tiny_cfg(SOLVER__EMA=decay))


def _process(rank: int, cfg, data: Path, folder: Path) -> None:
    torch.set_num_threads(1)
    place = f"file://{folder}/rendezvous"
    torch.distributed.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
    comm.create_local_process_group(2)
    _register(data)
    torch.save(train(cfg)._average.averages, folder / f"{rank}.pth")
    comm.synchronize()


def test_two_processes_have_the_same_averages(tiny_data, tiny_cfg, tmp_path):
    cfg = tiny_cfg(SOLVER__EMA=0.9, MODEL__DEVICE="cpu", DATASETS__TEST=())
    spawn(_process, (cfg, tiny_data, tmp_path), nprocs=2)
    one, other = (torch.load(tmp_path / f"{rank}.pth", weights_only=True) for rank in range(2))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    model = final_state(cfg.OUTPUT_DIR)["model"]
    assert one and all(torch.equal(one[name], model[name]) for name in one)
