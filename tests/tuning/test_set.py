"""SET: spectra of the patches, and the formula in float64. What Rein shares is in test_rein.py."""

import cmath
from copy import deepcopy
from math import atan2, cos, exp, pi, sqrt

import pytest
import torch
from torch import Tensor

from fishertune_d2.tuning import build_tuning_method
from fishertune_d2.tuning.set import compose, decompose

from .conftest import FAMILIES, naively_refined


def published_change(patch: Tensor, block: int, p: dict[str, Tensor]) -> Tensor:
    """One patch (D,), in numbers: to phases and amplitudes, the tokens of each, and back."""
    width, x = len(patch), patch.tolist()
    phases, amplitudes = [], []
    for k in range(width):
        z = sum(x[c] * cmath.exp(-2j * pi * k * c / width) for c in range(width))
        real = z.real if abs(z.real) >= 1e-5 else 1e-5
        # Of a real signal; the sign of a rounding error would decide between pi and -pi.
        imaginary = 0.0 if k in (0, width // 2) else z.imag
        phases.append(atan2(imaginary, real))
        amplitudes.append(sqrt(max(abs(z) ** 2, 1e-5)))
    first = p["learnable_tokens_a"][block] @ p["learnable_tokens_b"][block]
    phases = attended(phases, first, p, "")
    amplitudes = attended(amplitudes, p["learnable_tokens2"][block], p, "2", normalise=True)
    half = width // 2
    out = []
    for c in range(width):
        value = amplitudes[0] * cos(phases[0])
        value += amplitudes[half] * cos(phases[half]) * (-1) ** c
        for k in range(1, half):
            value += 2 * amplitudes[k] * cos(phases[k] + 2 * pi * k * c / width)
        out.append(value / sqrt(width) / sqrt(2 * width))
    return patch.new_tensor(out)


def attended(features, tokens, p, suffix, normalise=False) -> list[float]:
    width, features = len(features), tokens.new_tensor(features, dtype=torch.float64)
    scores = [float(features @ token) for token in tokens]
    if normalise:
        mean = sum(scores) / len(scores)
        variance = sum((s - mean) ** 2 for s in scores) / len(scores)
        scores = [(s - mean) / sqrt(variance + 1e-5) for s in scores]
    weights = [exp(s / sqrt(width)) for s in scores]
    for weight, token in list(zip(weights, tokens, strict=True))[1:]:
        said = p[f"mlp_token2feat{suffix}.weight"] @ token + p[f"mlp_token2feat{suffix}.bias"]
        features = features + weight / sum(weights) * said
    return (p[f"mlp_delta_f{suffix}.weight"] @ features + p[f"mlp_delta_f{suffix}.bias"]).tolist()


def attached(cfg, model) -> dict[str, Tensor]:
    method = build_tuning_method(cfg)
    torch.manual_seed(1)
    method.attach(model.backbone, model.sem_seg_head)
    parameters = method.parameters(model.backbone)
    return {name.removeprefix("set."): p.data for name, p in parameters.items()}


@pytest.mark.parametrize("vfm", FAMILIES)
def test_patches_are_changed_as_published(segmentor, device, vfm):
    cfg, model = segmentor("set", vfm)
    model.double()
    frozen, images = deepcopy(model.backbone), torch.randn(2, 3, 48, 64).to(device, torch.float64)
    p = attached(cfg, model)
    p["scale"].fill_(0.3)
    with torch.no_grad():
        naive = naively_refined(frozen, lambda patch, i: 0.3 * published_change(patch, i, p))
        expected, maps, plain = naive(images), model.backbone(images), frozen(images)
    for level, values in maps.items():
        torch.testing.assert_close(values, expected[level], rtol=1e-9, atol=1e-9)
        assert not torch.allclose(values, plain[level], rtol=0.1)


def test_the_second_tokens_are_initialised_as_published(segmentor):
    tokens = attached(*segmentor("set"))["learnable_tokens2"]
    bound = (6 / (3 * 16**2 + 32)) ** 0.5
    assert 0.98 * bound < tokens.abs().max() <= bound


def test_an_image_does_not_depend_on_its_batch(segmentor, device):
    cfg, model = segmentor("set")
    model.double()
    attached(cfg, model)["scale"].fill_(0.3)
    images = torch.randn(3, 3, 48, 64).to(device, torch.float64)
    with torch.no_grad():
        together = model.backbone(images)["res5"]
        alone = torch.cat([model.backbone(image[None])["res5"] for image in images])
    torch.testing.assert_close(together, alone)


def test_there_and_back_is_half_the_power():
    x = torch.randn(5, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(compose(*decompose(x)), x / sqrt(2))


@pytest.mark.parametrize("width", [32, 33])
def test_the_frequencies_that_are_real_in_a_real_signal_are_so(monkeypatch, width):
    # CPUs leave their imaginary parts out, so that no result here would show them.
    spectra, inverse = [], torch.fft.irfft
    monkeypatch.setattr(torch.fft, "irfft", lambda x, **o: spectra.append(x) or inverse(x, **o))
    phase, amplitude = torch.randn(2, 7, width), torch.rand(2, 7, width)
    compose(phase, amplitude)
    imaginary = spectra[0].imag[..., : width // 2 + 1]
    real = {0, width // 2} if width % 2 == 0 else {0}
    assert {k for k in range(width // 2 + 1) if not imaginary[..., k].any()} == real


def test_patches_of_zeros_have_finite_derivatives():
    x = torch.zeros(2, 32, requires_grad=True)
    compose(*decompose(x)).sum().backward()
    assert x.grad.isfinite().all()
