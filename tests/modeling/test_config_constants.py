"""What the config says holds, whatever checkpoint is loaded: constants and weights of losses."""

import logging

import pytest
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import Checkpointer

from .test_segmentor import build, label, photo

CONSTANT = "sem_seg_head.criterion.empty_weight"


def _older_state() -> dict[str, torch.Tensor]:
    """What was saved with another NO_OBJECT_WEIGHT, when the constant was in the state."""
    state = build("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.1).state_dict()
    return {**state, CONSTANT: torch.tensor([1.0, 1.0, 1.0, 1.0, 0.1])}


def test_a_checkpoint_holds_weights_and_no_constants_of_the_config():
    model = build()
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()}


def _plain(model, path):
    model.load_state_dict(torch.load(path)["model"], strict=True)


@pytest.mark.parametrize(
    "load",
    [
        _plain,
        lambda model, path: Checkpointer(model).load(str(path)),
        lambda model, path: DetectionCheckpointer(model).load(str(path)),
    ],
)
def test_the_weight_of_no_object_is_the_configs(load, tmp_path, caplog):
    torch.save({"model": _older_state()}, tmp_path / "older.pth")
    model = build("MODEL.MASK_FORMER.NO_OBJECT_WEIGHT", 0.7)
    with caplog.at_level(logging.WARNING):
        load(model, tmp_path / "older.pth")
    criterion = model.sem_seg_head.criterion
    assert criterion.empty_weight.tolist() == pytest.approx([1, 1, 1, 1, 0.7])
    assert not caplog.records
    # Any other name that has no place is still refused.
    with pytest.raises(RuntimeError, match="criterion.other"):
        model.load_state_dict(_older_state() | {f"{CONSTANT[:-12]}other": torch.zeros(1)})


def test_the_constant_moves_with_the_model():
    criterion = build().sem_seg_head.criterion
    assert criterion.to(torch.float64).empty_weight.dtype == torch.float64


def test_loss_weight_is_a_factor_of_each_of_mask2formers_losses():
    batch = [{"image": photo(64, 64), "sem_seg": label(64, 64)}]
    losses = []
    for changes in (
        (),
        ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 1.0),
        ("MODEL.SEM_SEG_HEAD.LOSS_WEIGHT", 4.0),
    ):
        model = build(*changes)
        torch.manual_seed(0)
        losses.append(model(batch))
    plain, one, four = losses
    assert one == plain  # to the bit
    # 4 is a power of two, so nothing is rounded, and matches do not depend on it.
    assert {name: 4 * loss for name, loss in plain.items()} == four
