import copy

import pytest
import timm
import torch
from torch import nn

from fishertune_d2.fisher import StatisticsPerturbation


class _Tokens(nn.Module):
    """Passes token maps through one perturbed point."""

    def __init__(self):
        super().__init__()
        self.point = nn.Identity()

    def forward(self, x):
        return self.point(x)


def _reference(x, eps_mu, eps_sigma):
    """Eq. 6 as printed, in float64, on (B, N, C)."""
    x = x.double()
    mu = x.mean(1, keepdim=True)
    sigma = (x.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
    alpha = mu + eps_mu.double() * mu.std(0, keepdim=True, correction=0)
    beta = sigma + eps_sigma.double() * sigma.std(0, keepdim=True, correction=0)
    return beta * (x - mu) / sigma + alpha


@pytest.mark.parametrize("eps_mode", ["image", "channel"])
def test_is_equation_6(eps_mode):
    model, x = _Tokens(), torch.randn(4, 6, 5)
    perturb = StatisticsPerturbation([model.point], eps_mode=eps_mode)
    with perturb.drawing():
        shifted = model(x)
    drawn = perturb._drawn[0]
    assert drawn.eps_mu.shape == ((4, 1, 1) if eps_mode == "image" else (4, 1, 5))
    expected = _reference(x, drawn.eps_mu, drawn.eps_sigma)
    torch.testing.assert_close(shifted.double(), expected, rtol=1e-5, atol=1e-5)
    weights = torch.exp(-(drawn.eps_mu.abs() + drawn.eps_sigma.abs()).mean((1, 2)))
    torch.testing.assert_close(perturb.weights(), weights)
    assert ((weights > 0) & (weights <= 1)).all()


def test_one_image_replays_what_the_batch_drew():
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 5), nn.Identity())
    perturb = StatisticsPerturbation([model[0], model[2]])
    x = torch.randn(3, 6, 5)
    with perturb.drawing():
        together = model(x)
    for i in range(3):
        with perturb.replaying(i):
            torch.testing.assert_close(model(x[i : i + 1]), together[i : i + 1])
    torch.testing.assert_close(model(x), nn.Sequential(*model)(x))  # off outside the block


def test_each_part_of_a_batch_draws_its_own_numbers():
    model = nn.Sequential(nn.Identity(), nn.Linear(5, 5), nn.Identity())
    perturb = StatisticsPerturbation([model[0], model[2]])
    parts = torch.randn(5, 6, 5).split([3, 2])
    with perturb.drawing():
        for part in parts:
            model(part)
    eps = [shift.eps_mu.flatten().tolist() for shift in perturb._drawn]
    assert eps[0] == eps[1] and eps[2] == eps[3]  # at both points
    assert len({*eps[0], *eps[2]}) == 5


@pytest.mark.parametrize("options", [{"strength": 0.0}, {"p": 0.0}])
def test_switched_off_is_the_identity_to_the_bit(options):
    model, x = _Tokens(), torch.randn(4, 6, 5)
    perturb = StatisticsPerturbation([model.point], **options)
    with perturb.drawing():
        assert torch.equal(model(x), x)
    assert torch.equal(perturb.weights(), torch.ones(4))


def test_a_batch_of_one_stays_as_it_is():
    model, x = _Tokens(), torch.randn(1, 6, 5)
    perturb = StatisticsPerturbation([model.point])
    with perturb.drawing():
        assert torch.equal(model(x), x)


def test_prefix_tokens_and_square_maps():
    model, x = _Tokens(), torch.randn(4, 7, 5)
    perturb = StatisticsPerturbation([model.point], num_prefix_tokens=1)
    torch.manual_seed(0)
    with perturb.drawing():
        flat = model(x)
    assert torch.equal(flat[:, 0], x[:, 0])
    torch.manual_seed(0)
    with perturb.drawing():
        square = model(x[:, 1:].reshape(4, 2, 3, 5))
    torch.testing.assert_close(square.reshape(4, 6, 5), flat[:, 1:])


def test_each_gradient_depends_on_its_own_image():
    model, x = _Tokens(), torch.randn(3, 6, 5, requires_grad=True)
    perturb = StatisticsPerturbation([model.point])
    with perturb.drawing():
        (model(x)[1] ** 2).sum().backward()
    assert x.grad[1].abs().sum() > 0
    assert x.grad[0].abs().sum() == x.grad[2].abs().sum() == 0


def test_refuses():
    with pytest.raises(ValueError, match="unknown eps_mode 'pixel'"):
        StatisticsPerturbation([], eps_mode="pixel")
    with pytest.raises(ValueError, match="strength must not be negative: got -1"):
        StatisticsPerturbation([], strength=-1)
    with pytest.raises(ValueError, match="has 2 numbers for 1 points: give one number, or one"):
        StatisticsPerturbation([nn.Identity()], num_prefix_tokens=[0, 1])
    with pytest.raises(RuntimeError, match="nothing to replay"):
        with StatisticsPerturbation([nn.Identity()]).replaying(0):
            pass


def test_of_a_vit_the_patch_embedding_and_three_blocks_without_the_prefix():
    vit = timm.create_model("test_vit", reg_tokens=2, num_classes=0)
    perturb = StatisticsPerturbation.of_vit(vit, strength=0.5)
    assert perturb.points == [vit.patch_embed, vit.blocks[1], vit.blocks[2], vit.blocks[3]]
    assert (perturb.num_prefix_tokens, perturb.strength) == ([0, 3, 3, 3], 0.5)
    inside = StatisticsPerturbation.of_vit(nn.Sequential(nn.Identity(), vit))
    assert (inside.points, inside.num_prefix_tokens) == (perturb.points, [0, 3, 3, 3])
    given = StatisticsPerturbation.of_vit(vit, num_prefix_tokens=1)
    assert given.num_prefix_tokens == [0, 1, 1, 1]
    with pytest.raises(ValueError, match="ModuleList holds 2 ViTs: say where to perturb"):
        StatisticsPerturbation.of_vit(nn.ModuleList([vit, copy.deepcopy(vit)]))
    with pytest.raises(ValueError, match="Linear has no patch_embed or no blocks: say where"):
        StatisticsPerturbation.of_vit(nn.Linear(2, 2))


def test_a_patch_embedding_that_flattens_is_shifted_as_one_that_does_not(one_thread):
    shifted = []
    for dynamic in (False, True):
        torch.manual_seed(0)
        vit = timm.create_model(
            "test_vit", img_size=64, reg_tokens=2, dynamic_img_size=dynamic, num_classes=0
        ).double()
        x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
        with StatisticsPerturbation.of_vit(vit).drawing(torch.Generator().manual_seed(0)):
            shifted.append(vit(x))
        assert vit.patch_embed(x).dim() == (4 if dynamic else 3)
    torch.testing.assert_close(*shifted)
