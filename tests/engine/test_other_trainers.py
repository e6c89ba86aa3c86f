"""FisherTune on trainers and models that are not ours."""

import weakref
from itertools import cycle
from pathlib import Path

import pytest
import timm
import torch
from detectron2.config import get_cfg
from detectron2.engine import AMPTrainer, DefaultTrainer, HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fishertune_d2 import apply_fishertune
from fishertune_d2.engine import FisherEstimation
from fishertune_d2.engine.other_trainers import loss_of_one_image
from fishertune_d2.fisher import (
    FisherEstimate,
    ImageShift,
    Selection,
    domain_related_fisher,
    find_candidates,
)

STEPS, WARMUP = 8, 3


class _Model(nn.Module):
    """A ViT, a neck with a batch norm, two losses; it writes a metric, as Detectron2's heads do."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.backbone = timm.models.VisionTransformer(
            img_size=32, patch_size=8, num_classes=0, embed_dim=24, depth=3, num_heads=2
        )
        self.neck = nn.BatchNorm1d(24)
        self.head = nn.Linear(24, 3)

    def forward(self, batch: list[dict]) -> dict[str, torch.Tensor]:
        get_event_storage().put_scalar("images", len(batch))
        logits = self.head(self.neck(self.backbone(torch.stack([b["image"] for b in batch]))))
        labels = torch.tensor([b["label"] for b in batch])
        return {
            "loss_class": nn.functional.cross_entropy(logits, labels),
            "loss_norm": 0.01 * logits.square().mean(),
        }


def _data(seed: int = 0) -> list[list[dict]]:
    """Three batches of four."""
    torch.manual_seed(seed)
    return [[{"image": torch.randn(3, 32, 32), "label": i % 3} for i in range(4)] for _ in range(3)]


def _optimizer(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.1)


def _adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)


def _trainer(model: nn.Module | None = None) -> SimpleTrainer:
    model = model or _Model()
    return SimpleTrainer(model, cycle(_data()), _optimizer(model))


def _apply(trainer, tmp_path, **options) -> FisherEstimation:
    options = {"max_iter": STEPS, "warmup": WARMUP, "batches": 2, **options}
    options = {"data_loader": _data(seed=1), "output_dir": tmp_path, **options}
    return apply_fishertune(trainer, **options)


class _Weights(HookBase):
    """The weights after each step."""

    def __init__(self):
        self.seen = []

    def after_step(self) -> None:
        parameters = self.trainer.model.named_parameters()
        self.seen.append({name: p.detach().clone() for name, p in parameters})


def test_the_backbone_stands_still_then_ever_more_of_the_selected_moves(tmp_path):
    trainer, weights = _trainer(), _Weights()
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.register_hooks([weights])
    estimation = _apply(trainer, tmp_path / "a new" / "folder")
    assert estimation.selection is None
    trainer.train(0, STEPS)
    counts = []
    masks = {f"backbone.{n}": mask for n, mask in estimation.selection.masks(0.05).items()}
    for step, seen in enumerate(weights.seen):
        moved = {name: value != start[name] for name, value in seen.items()}
        assert all(moved[name].all() for name in ("head.weight", "neck.weight"))
        inside = {name: each for name, each in moved.items() if name.startswith("backbone.")}
        for name, each in inside.items():
            assert not each[~masks.get(name, torch.zeros_like(each))].any(), (step, name)
        counts.append(sum(int(each.sum()) for each in inside.values()))
    base = sum(p.numel() for p in trainer.model.backbone.parameters())
    assert counts[:WARMUP] == [0] * WARMUP
    assert counts[WARMUP] == int(0.01 * base)
    assert counts[-1] == int(0.05 * base)
    assert counts == sorted(counts)


@pytest.mark.parametrize("allocation", ["global", "layer"])
def test_whole_neurons_move_and_nothing_else(allocation, tmp_path):
    trainer, weights = _trainer(), _Weights()
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.register_hooks([weights])
    options = {"unit": "neuron", "allocation": allocation, "d_min": 0.05, "d_max": 0.2}
    estimation = _apply(trainer, tmp_path, **options)
    trainer.train(0, STEPS)
    selection = estimation.selection
    assert selection.unit == "neuron"
    estimate = FisherEstimate.load(tmp_path / "fisher.safetensors")
    scores = domain_related_fisher(estimate.by_unit(selection.units))
    base = sum(p.numel() for p in trainer.model.backbone.parameters())
    expected = Selection.from_scores(scores, 0.2, base, selection.units, allocation)
    assert all(torch.equal(selection.indices[n], i) for n, i in expected.indices.items())
    for step, share in ((WARMUP - 1, 0.0), (WARMUP, 0.05), (STEPS - 1, 0.2)):
        masks = {f"backbone.{name}": mask for name, mask in selection.masks(share).items()}
        seen = weights.seen[step]
        moved = {name: seen[name] != start[name] for name in seen if name.startswith("backbone.")}
        for name, each in moved.items():
            assert not each[~masks.get(name, torch.zeros_like(each))].any(), (step, name)
        count = sum(int(each.sum()) for each in moved.values())
        assert 0.9 * selection.weights(share) <= count <= selection.weights(share)
    assert trainer.storage.latest()["fisher/tuned_parameters"][0] == selection.weights(0.2)


def test_steps_of_sensitive_neurons_are_smaller(tmp_path):
    moved = {}
    for steps in ("equal", "fisher"):
        trainer = _trainer()
        weights = trainer.model.backbone.state_dict()
        start = {name: weight.clone() for name, weight in weights.items()}
        options = {"unit": "neuron", "d_min": 0.2, "d_max": 0.2, "steps": steps}
        estimation = _apply(trainer, tmp_path, max_iter=WARMUP + 1, **options)
        trainer.train(0, WARMUP + 1)
        selection = estimation.selection
        moved[steps] = {name: weights[name] - start[name] for name in selection.shapes}
    name = max(selection.indices, key=lambda name: len(selection.indices[name]))
    index, factors = selection.indices[name], selection.steps[name]
    assert factors.max() > 2 * factors.min()
    part = selection.units.groups[name].parts[0]
    plain, scaled = (
        each[part.name].movedim(part.dim, 0)[part.start + index] for each in moved.values()
    )
    assert plain.abs().max() > 0
    torch.testing.assert_close(scaled, factors[:, None] * plain, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("warmup", [0, 1, 20])
def test_the_first_step_of_adamw_is_the_learning_rate_after_any_warmup(warmup, tmp_path):
    model = _Model()
    trainer = SimpleTrainer(model, cycle(_data()), _adamw(model))
    weights = model.backbone.state_dict()
    start = {name: weight.clone() for name, weight in weights.items()}
    _apply(trainer, tmp_path, warmup=warmup, max_iter=warmup + 1)
    trainer.train(0, warmup + 1)
    largest = max(float((weights[name] - start[name]).abs().max()) for name in start)
    assert largest == pytest.approx(1e-3, rel=1e-3)


def test_another_unit_than_the_checkpoints_is_refused(tmp_path):
    cfg = _cfg(tmp_path / "out")
    for unit, stop in (("neuron", WARMUP + 2), ("weight", None)):
        trainer = _DefaultTrainer(cfg)
        _apply(trainer, cfg.OUTPUT_DIR, unit=unit)
        if stop is None:
            with pytest.raises(
                ValueError, match="unit 'neuron', .* asks for 'weight': set .*unit="
            ):
                trainer.resume_or_load(resume=True)
        else:
            trainer.register_hooks([_Kill(stop)])
            with pytest.raises(RuntimeError, match="killed"):
                trainer.train()


def test_the_optimizer_is_free_again_after_training(tmp_path):
    trainer = _trainer()
    _apply(trainer, tmp_path)
    trainer.train(0, STEPS)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.optimizer.step()
    for name in ("backbone.blocks.0.norm1.weight", "backbone.blocks.0.mlp.fc1.weight"):
        assert (trainer.model.get_parameter(name) != before[name]).float().mean() > 0.9


def test_scaled_gradients_move_the_same_weights(tmp_path, monkeypatch):
    plain = _trainer()
    _apply(plain, tmp_path / "plain")
    plain.train(0, STEPS)
    # AMPTrainer asks for CUDA and its autocast casts nothing on a CPU; its scaler works there.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    model = _Model()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    scaled = AMPTrainer(model, cycle(_data()), _optimizer(model), grad_scaler=scaler)
    _apply(scaled, tmp_path / "scaled")
    scaled.train(0, STEPS)
    assert scaler.get_scale() == 64.0 * 4  # a power of two rounds nothing
    expected = dict(plain.model.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_F_is_the_mean_of_squared_gradients_of_each_images_summed_losses(tmp_path):
    trainer = _trainer()
    _apply(trainer, tmp_path, warmup=0, max_iter=1)
    trainer.train(0, 1)
    model = _Model()  # as that one was before the first step
    model.neck.eval()
    candidates = {c.name: c.parameter for c in find_candidates(model.backbone)}
    expected = {name: torch.zeros_like(parameter) for name, parameter in candidates.items()}
    for item in (item for batch in _data(seed=1)[:2] for item in batch):
        with EventStorage():
            loss = sum(model([item]).values())
        gradients = torch.autograd.grad(loss, list(candidates.values()))
        for name, gradient in zip(candidates, gradients, strict=True):
            expected[name] += gradient.square() / 8
    estimate = FisherEstimate.load(tmp_path / "fisher.safetensors")
    assert estimate.images == 8
    torch.testing.assert_close(estimate.f, expected)
    assert any(not torch.equal(estimate.shifted[name], estimate.f[name]) for name in expected)


def test_the_estimate_leaves_no_trace_in_metrics_and_batch_norms(tmp_path):
    trainer = _trainer()
    _apply(trainer, tmp_path)
    trainer.train(0, STEPS)
    assert [n for n, _ in trainer.storage.history("images").values()] == [4] * STEPS
    assert int(trainer.model.neck.num_batches_tracked) == STEPS


def test_one_image_at_a_time_selects_as_the_losses_of_a_batch_do(tmp_path):
    def losses(model: nn.Module, batch: list[dict]) -> torch.Tensor:
        images = torch.stack([item["image"] for item in batch])
        logits = model.head(model.neck(model.backbone(images)))
        labels = torch.tensor([item["label"] for item in batch])
        entropy = nn.functional.cross_entropy(logits, labels, reduction="none")
        return entropy + 0.01 * logits.square().mean(1)

    selections = []
    for options in ({}, {"loss_fn": losses, "estimator": "diagonal"}):
        trainer = _trainer()
        selections.append(_apply(trainer, tmp_path, **options))
        trainer.train(0, STEPS)
    one, other = (estimation.selection.indices for estimation in selections)
    common = sum(int(torch.isin(one[name], other[name]).sum()) for name in one)
    assert common > 0.99 * sum(map(len, one.values()))  # roundings swap the last ones


def test_a_checkpointed_backbone_is_measured_and_trained_as_a_plain_one(tmp_path):
    weights = []
    for checkpointed in (False, True):
        model = _Model()
        model.backbone.set_grad_checkpointing(checkpointed)
        trainer = _trainer(model)
        _apply(trainer, tmp_path)
        trainer.train(0, STEPS)
        assert model.backbone.grad_checkpointing == checkpointed
        weights.append(model.state_dict())
    torch.testing.assert_close(*weights, rtol=0, atol=0)


class _DefaultTrainer(DefaultTrainer):
    """Detectron2's, with its checkpoints, schedule and writers, on the model above."""

    build_model = classmethod(lambda cls, cfg: _Model())
    build_optimizer = classmethod(lambda cls, cfg, model: _adamw(model))
    build_train_loader = classmethod(lambda cls, cfg: _data()[:1] * STEPS)


class _Kill(HookBase):
    def __init__(self, iteration: int):
        self.iteration = iteration

    def before_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise RuntimeError("killed")


def _cfg(output_dir: Path):
    cfg = get_cfg()
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.WARMUP_ITERS = STEPS, (5,), 2
    cfg.SOLVER.CHECKPOINT_PERIOD = 1
    cfg.DATASETS.TEST = ()
    cfg.OUTPUT_DIR = str(output_dir)
    output_dir.mkdir()
    return cfg


@pytest.mark.parametrize("kill_at", [1, WARMUP, WARMUP + 2])
def test_a_resumed_default_trainer_ends_as_if_it_had_not_stopped(kill_at, tmp_path):
    ends = []
    for name, stops in (("whole", []), ("resumed", [kill_at])):
        cfg = _cfg(tmp_path / name)
        for stop in [*stops, None]:
            trainer = _DefaultTrainer(cfg)
            _apply(trainer, cfg.OUTPUT_DIR)
            trainer.resume_or_load(resume=True)
            if stop is None:
                trainer.train()
                break
            trainer.register_hooks([_Kill(stop)])
            with pytest.raises(RuntimeError, match="killed"):
                trainer.train()
        assert trainer.start_iter == (stops[0] if stops else 0)
        ends.append(trainer.model.state_dict())
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=0)


def _process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    comm.create_local_process_group(2)
    model = DistributedDataParallel(_Model(), broadcast_buffers=False)
    trainer = SimpleTrainer(model, cycle(_data(seed=rank)), _optimizer(model))
    estimation = _apply(trainer, folder, data_loader=_data(seed=2 + rank))
    trainer.train(0, STEPS)
    parameters = dict(model.module.named_parameters())
    seen = {"parameters": parameters, "indices": estimation.selection.indices}
    torch.save(seen, folder / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_two_processes_select_together_and_stay_equal(start_process, tmp_path):
    processes = [start_process(_process, rank, tmp_path) for rank in range(2)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    one, other = (torch.load(tmp_path / f"{rank}.pth") for rank in range(2))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert FisherEstimate.load(tmp_path / "fisher.safetensors").images == 2 * 2 * 4
    start = dict(_Model().named_parameters())
    moved = sum(
        int((p != start[name]).sum())
        for name, p in one["parameters"].items()
        if name.startswith("backbone.")
    )
    assert moved == sum(map(len, one["indices"].values())) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": STEPS}, "warmup is 8: choose 0 or more, and less than max_iter 8"),
        ({"backbone": "encoder"}, "no submodule 'encoder': .* it has backbone, neck, head"),
        ({"backbone": "neck"}, "no parameter named blocks"),
        ({"d_min": 0.1}, "need 0 <= d_min <= d_max <= 1"),
        ({"schedule": "cosine"}, "unknown schedule 'cosine'"),
        ({"batches": 0}, "batches is 0: choose at least 1"),
        ({"estimator": "diagnoal"}, "estimator is 'diagnoal': choose from diagonal, diagonal_loop"),
        ({"estimator": "closed_form"}, "'closed_form' passes whole batches, .* pass a loss_fn"),
        ({"d_max": 1.0}, r"and only 19,584 can be selected: choose at most 0\.\d+"),
        ({"d_max": 1.0, "unit": "neuron"}, "and only 19,512 can be selected"),  # no bias of fc2
        ({"unit": "row"}, "unknown unit 'row': choose from weight, neuron"),
        ({"allocation": "block"}, "allocation is 'block': choose from global, layer"),
        ({"steps": "natural"}, "steps is 'natural': choose from equal, fisher"),
    ],
)
def test_refuses_what_cannot_work(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        _apply(_trainer(), tmp_path, **options)


def test_a_folder_that_cannot_be_written_is_refused_before_training(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file/out"):
        _apply(_trainer(), tmp_path / "file" / "out")


def test_refuses_a_frozen_backbone_and_a_second_time(tmp_path):
    model = _Model()
    model.backbone.blocks[1].requires_grad_(False)
    with pytest.raises(ValueError, match=r"blocks\.1\.attn\.qkv\.weight .* is frozen or not in"):
        _apply(_trainer(model), tmp_path)
    trainer = _trainer()
    trainer.optimizer = _optimizer(trainer.model.head)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.qkv\.weight .* is frozen or not in"):
        _apply(trainer, tmp_path)
    trainer = _trainer()
    _apply(trainer, tmp_path)
    with pytest.raises(ValueError, match="apply it once"):
        _apply(trainer, tmp_path)


@pytest.mark.parametrize(
    ("options", "start", "error", "message"),
    [
        ({"data_loader": [[{}]]}, 0, ValueError, "have one image, so Eq. 6 shifts nothing"),
        ({"estimator": "diagonal", "loss_fn": loss_of_one_image}, 0, ValueError, "number for 4"),
        ({}, WARMUP + 1, RuntimeError, "call apply_fishertune before a checkpoint is loaded"),
    ],
)
def test_says_at_the_estimation_what_is_wrong(options, start, error, message, tmp_path):
    trainer = _trainer()
    _apply(trainer, tmp_path, **options)
    with pytest.raises(error, match=message):
        trainer.train(start, STEPS)


def test_the_data_may_end_with_a_batch_of_one_image(tmp_path):
    first, second, _ = _data(seed=1)
    trainer = _trainer()
    _apply(trainer, tmp_path, data_loader=[first, second, first[:1]], batches=5)
    trainer.train(0, STEPS)
    assert FisherEstimate.load(tmp_path / "fisher.safetensors").images == 9


def test_the_data_loaders_iterator_ends_with_the_estimate(tmp_path):
    class Loader:
        def __iter__(self):
            batches = (batch for batch in _data(seed=1))
            self.iterator = weakref.ref(batches)
            return batches

    loader, trainer = Loader(), _trainer()
    _apply(trainer, tmp_path, data_loader=loader)
    trainer.train(0, WARMUP + 1)
    assert loader.iterator() is None


def test_a_shift_of_images_takes_batches_of_one_image(tmp_path):
    model = _Model()
    model.neck = nn.Identity()  # a batch norm has no statistics of one image
    trainer, darker = _trainer(model), ImageShift(lambda image, random: image // 2, "darker")
    image = {"image": torch.randint(256, (3, 32, 32)).float(), "label": 0}
    estimation = _apply(trainer, tmp_path, data_loader=[[image]] * 2, perturb=darker)
    trainer.train(0, STEPS)
    assert estimation.selection.count(0.05) == int(0.05 * estimation.selection.base)


def test_a_model_may_give_its_losses_already_summed():
    assert loss_of_one_image(lambda batch: torch.tensor(3.0), [{}]).tolist() == [3.0]
