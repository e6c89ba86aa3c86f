"""Every tuning method that adds parameters, through the real Trainer on a tiny model.

The methods come from the registry: a new one is tested here without a line.
"""

import copy
import json
from functools import partial
from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import CfgNode
from detectron2.engine import HookBase
from detectron2.utils import comm
from safetensors.torch import save_file

from fishertune_d2.config import default_config
from fishertune_d2.engine import Trainer, WholeCheckpointer
from fishertune_d2.engine.parameter_counts import count_parameters
from fishertune_d2.export import delta_of_run, read_tuned, tuned_backbone
from fishertune_d2.plan import make_plan
from fishertune_d2.tuning import TUNING_REGISTRY, build_tuning_method

from .conftest import make_cfg, on_one_thread, same_states, train


def _adding() -> list[str]:
    cfg = default_config()
    return [name for name, make in TUNING_REGISTRY if make(cfg).adds]


@pytest.fixture(scope="module", params=_adding())
def method(request) -> str:
    """The name of a method that adds parameters."""
    return request.param


def _adding_cfg(make, method: str, output: str = "out", **options) -> CfgNode:
    options = {
        "TUNING__METHOD": method,
        "TUNING__WARMUP_ITERS": 1,
        "SOLVER__MAX_ITER": 4,
        "SOLVER__WEIGHT_DECAY": 0.5,
        "DATASETS__TEST": (),
        **options,
    }
    return make(output, **options)


@pytest.fixture
def adding_cfg(method, tiny_cfg):
    """Returns a function that makes a config of the method: T1 = 1, T3 = 3."""
    return partial(_adding_cfg, tiny_cfg, method)


@pytest.fixture(scope="module")
def make(tiny_data, tiny_head, device, tmp_path_factory):
    """As ``tiny_cfg``, for a run that several tests read."""
    options = {**tiny_head, "MODEL.DEVICE": device}
    return lambda *args, **keys: make_cfg(tmp_path_factory.mktemp("run"), options, *args, **keys)


@pytest.fixture(scope="module")
def whole(make, method):
    """The config, trainer and watch of an undisturbed run of the method."""
    options = {"DATASETS__TEST": ("tiny_day",), "TEST__PICTURES": 0}
    with on_one_thread():
        cfg = _adding_cfg(make, method, **options)
        return cfg, *_train(cfg)


@pytest.fixture(scope="module")
def warmup(make) -> str:
    """The warm-up of a run with another method."""
    with on_one_thread():
        cfg = _adding_cfg(make, "freeze")
        _train(cfg)
        return str(Path(cfg.OUTPUT_DIR) / "model_warmup.pth")


class _Watch(HookBase):
    """Keeps what the backbone holds when tuning has begun."""

    def before_step(self) -> None:
        trainer = self.trainer
        if trainer.iter == trainer.cfg.TUNING.WARMUP_ITERS:
            state = trainer.segmentor.backbone.state_dict()
            self.begun = {name: tensor.clone() for name, tensor in state.items()}


def _train(cfg, resume: bool = False, stop: int | None = None) -> tuple[Trainer, _Watch]:
    torch.manual_seed(99)  # what was drawn before does not count
    watch = _Watch()
    return train(cfg, watch, resume=resume, stop=stop), watch


def _state(cfg, name: str = "model_final") -> dict[str, torch.Tensor]:
    return torch.load(Path(cfg.OUTPUT_DIR) / f"{name}.pth", weights_only=True)["model"]


def _assert_same(got, expected) -> None:
    assert same_states(got, expected)


def test_trains_what_it_adds_and_nothing_of_the_backbones_own(whole):
    cfg, trainer, watch = whole
    own = Trainer.build_model(cfg).state_dict()
    assert _state(cfg, "model_warmup").keys() == own.keys()  # so any method starts from it

    added = trainer.method.parameters(trainer.segmentor.backbone)
    moving = {id(p) for p in added.values()}
    assert all(p.isfinite().all() for p in added.values())
    for name, tensor in trainer.segmentor.backbone.state_dict(keep_vars=True).items():
        assert (id(tensor) in moving) != torch.equal(tensor, watch.begun[name]), name
    for name, tensor in trainer.segmentor.named_parameters():
        assert tensor.requires_grad == (id(tensor) in moving or not name.startswith("backbone."))
        # DDP would wait for a gradient that never comes.
        assert (tensor.grad is not None) == tensor.requires_grad, name


def test_costs_what_was_planned(whole, adding_cfg):
    cfg, trainer, _ = whole
    tuning = adding_cfg("planned", TUNING__WARMUP_CHECKPOINT="another run's")
    counts, costs = count_parameters(cfg), make_plan(tuning)
    planned = costs.stages[-1].memory
    added = trainer.method.parameters(trainer.segmentor.backbone)
    assert counts["tuned_parameters"] == sum(p.numel() for p in added.values()) > 0
    own = Trainer.build_model(cfg).backbone
    assert counts["backbone_parameters"] == sum(p.numel() for p in own.parameters())

    trained = [p for group in trainer.optimizer.param_groups for p in group["params"]]
    assert planned.gradients == sum(p.grad.nbytes for p in trained)
    moments = trainer.optimizer.state_dict()["state"].values()
    assert planned.optimizer == sum(t.nbytes for each in moments for t in each.values())
    model = [*trainer.segmentor.parameters(), *trainer.segmentor.buffers()]
    assert planned.weights == sum(t.nbytes for t in model)
    # Beside the numbers, a file holds names, shapes and paddings.
    size = (Path(cfg.OUTPUT_DIR) / "model_final.pth").stat().st_size
    assert 0 < size - costs.files["model_final.pth"] < 1600 * len(model)


def test_resumes_to_the_bit_and_shares_a_warmup(whole, adding_cfg, warmup):
    cfg, trainer, _ = whole
    expected = trainer.optimizer.state_dict()["state"]
    parts = adding_cfg("parts")
    _train(parts, stop=3)  # two steps into tuning
    resumed, _ = _train(parts, resume=True)
    assert resumed.start_iter == 3
    _assert_same(_state(parts), _state(cfg))
    for key, moments in resumed.optimizer.state_dict()["state"].items():
        _assert_same(moments, expected[key])

    shared = adding_cfg("shared", TUNING__WARMUP_CHECKPOINT=warmup)
    _train(shared)
    _assert_same(_state(shared), _state(cfg))


def test_a_warm_up_from_a_tuned_model_trains_the_decoder_alone(whole, adding_cfg):
    weights = str(Path(whole[0].OUTPUT_DIR, "model_final.pth"))
    trainer = Trainer(adding_cfg("next", MODEL__WEIGHTS=weights))
    trainer.resume_or_load(resume=False)
    trained = {name for name, p in trainer.segmentor.named_parameters() if p.requires_grad}
    assert not any(name.startswith("backbone.") for name in trained)
    held = {id(p) for group in trainer.optimizer.param_groups for p in group["params"]}
    own = {name for name, p in trainer.segmentor.named_parameters() if id(p) in held}
    assert own == trained


def test_a_warm_up_from_a_tuned_model_resumes(tiny_cfg):
    first = _adding_cfg(tiny_cfg, "rein", SOLVER__MAX_ITER=2)
    _train(first)
    weights = str(Path(first.OUTPUT_DIR, "model_final.pth"))
    options = {"MODEL__WEIGHTS": weights, "TUNING__WARMUP_ITERS": 2}
    whole, parts = (_adding_cfg(tiny_cfg, "rein", name, **options) for name in ("whole", "parts"))
    _train(whole)
    _train(parts, stop=1)
    _train(parts, resume=True)
    _assert_same(_state(parts), _state(whole))


def _one_of_two(rank: int, cfg: CfgNode, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    trainer = Trainer(cfg)
    trainer.train()
    torch.save(trainer.segmentor.state_dict(), folder / f"rank_{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_stay_equal(adding_cfg, start_process, tmp_path):
    cfg = adding_cfg(MODEL__DEVICE="cpu")  # gloo
    processes = [start_process(_one_of_two, rank, cfg, tmp_path) for rank in (0, 1)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    first, second = (torch.load(tmp_path / f"rank_{rank}.pth") for rank in (0, 1))
    _assert_same(first, second)
    _assert_same(first, _state(cfg))


def _evaluate(cfg, weights: Path) -> tuple[dict, dict]:
    """As train_net.py --eval-only does: the results, and the state dict that gave them."""
    model = Trainer.build_model(cfg)
    checkpointer = WholeCheckpointer(model, cfg.OUTPUT_DIR, method=build_tuning_method(cfg))
    checkpointer.resume_or_load(str(weights), resume=False)
    Trainer.test(cfg, model)
    results = json.loads((Path(cfg.OUTPUT_DIR) / "results.json").read_text())
    return results, model.state_dict()


def test_is_evaluated_from_the_checkpoint_alone(whole, adding_cfg):
    cfg, *_ = whole
    out = Path(cfg.OUTPUT_DIR)
    trained = json.loads((out / "results.json").read_text())
    again = adding_cfg("again", SEED=7, DATASETS__TEST=("tiny_day",), TEST__PICTURES=0)
    evaluated, state = _evaluate(again, out / "model_final.pth")
    assert evaluated["source"] == trained["source"]
    _assert_same(state, _state(cfg))
    _, state = _evaluate(again, out / "model_warmup.pth")
    _assert_same(state, _state(cfg, "model_warmup"))  # to which nothing is added

    for other in ("fishertune", "freeze"):
        other = adding_cfg("other", TUNING__METHOD=other)
        with pytest.raises(ValueError, match="no place for, the first is backbone.*TUNING.METHOD"):
            _evaluate(other, out / "model_final.pth")


def test_is_exported_or_refused_with_a_reason(adding_cfg, tmp_path):
    torch.manual_seed(5)
    public = str(tmp_path / "public.safetensors")
    save_file(timm.create_model("test_vit", num_classes=0).state_dict(), public)
    cfg = adding_cfg(MODEL__VFM__WEIGHTS=public)
    trainer, _ = _train(cfg)
    out = Path(cfg.OUTPUT_DIR)
    (out / "config.yaml").write_text(cfg.dump())
    tuned = trainer.segmentor.backbone.eval()
    merged = copy.deepcopy(tuned)
    try:
        trainer.method.merge(merged)
    except ValueError as error:
        with pytest.raises(ValueError, match="model_final.pth cannot be exported: ") as refused:
            delta_of_run(out)
        assert str(error)[:100] in str(refused.value)
        return
    exported = read_tuned(out)
    _assert_same(exported.vit, merged.vit.state_dict())
    plain = tuned_backbone(delta_of_run(out), public).eval()
    _assert_same(plain.vit.state_dict(), exported.vit)
    image, tuned = torch.randn(1, 3, 48, 64), tuned.cpu()
    with torch.no_grad():
        torch.testing.assert_close(plain(image), tuned(image), rtol=1e-4, atol=1e-4)


def test_checkpointed_blocks_change_no_number(whole, adding_cfg):
    checkpointed = adding_cfg("other", MODEL__VFM__CHECKPOINT_BLOCKS=True)
    _train(checkpointed)
    _assert_same(_state(checkpointed), _state(whole[0]))


def test_refuses_a_checkpoint_of_other_options(tiny_cfg):
    cfg = tiny_cfg(TUNING__METHOD="lora", TUNING__WARMUP_ITERS=0, SOLVER__MAX_ITER=1)
    _train(cfg)
    other = tiny_cfg("other", TUNING__METHOD="lora", TUNING__LORA__RANK=4)
    with pytest.raises(ValueError, match="holds 24 tensors .*lora_A.* its options as they were"):
        _evaluate(other, Path(cfg.OUTPUT_DIR) / "model_final.pth")
