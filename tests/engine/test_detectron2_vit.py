"""Candidates, Eq. 6 and F of Detectron2's own ViT."""

import torch
from detectron2.modeling import ViT
from torch import nn

from fishertune_d2.fisher import (
    KINDS,
    StatisticsPerturbation,
    estimate_fisher,
    find_candidates,
)


def _vit() -> nn.Module:
    """Detectron2's, on maps of 4 x 4 with windows of 3 x 3: padded, and folded into the batch."""
    torch.manual_seed(0)
    return ViT(
        img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=2, use_rel_pos=True,
        window_size=3, window_block_indexes=[0, 1], pretrain_img_size=32,
    )  # fmt: skip


def test_candidates_of_detectron2s_vit():
    width, candidates = 24, find_candidates(_vit())
    assert {(c.kind, c.block) for c in candidates} == {(k, b) for k in KINDS for b in range(3)}
    numbers = {"Q": width * width + width, "FFN": 8 * width * width + 5 * width}
    for kind in ("Q", "K", "V", "FFN"):
        count = sum(c.numel for c in candidates if c.kind == kind)
        assert count == 3 * numbers.get(kind, numbers["Q"])


def test_eq6_on_detectron2s_vit_is_replayed_for_each_image():
    vit, images = _vit(), torch.randn(4, 3, 32, 32)
    shift = StatisticsPerturbation.of_vit(vit)
    assert shift.points == [vit.patch_embed, vit.blocks[0], vit.blocks[0], vit.blocks[1]]
    plain = vit(images)["last_feat"]
    with shift.drawing(torch.Generator().manual_seed(0)):
        together = vit(images)["last_feat"]
    assert not torch.allclose(together, plain, atol=1e-2)
    for i in range(4):
        with shift.replaying(i):
            alone = vit(images[i : i + 1])["last_feat"]
        torch.testing.assert_close(alone[0], together[i], rtol=1e-4, atol=1e-5)


def test_a_batch_gives_the_fisher_information_of_detectron2s_vit_as_the_loop_does():
    vit = _vit()
    batches = torch.randn(2, 3, 3, 32, 32)

    def loss(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return model(batch)["last_feat"].square().mean((1, 2, 3))

    found = [
        estimate_fisher(
            vit, batches, loss, find_candidates(vit), estimator=estimator,
            perturb=StatisticsPerturbation.of_vit(vit),
        )
        for estimator in ("diagonal", "diagonal_loop")
    ]  # fmt: skip
    torch.testing.assert_close(found[0].f, found[1].f, rtol=1e-3, atol=1e-7)
    torch.testing.assert_close(found[0].shifted, found[1].shifted, rtol=1e-3, atol=1e-7)
