"""SET (Yi et al., ACM MM 2024; the paper's SDT): Rein's tokens on the spectra of the patches.

A Fourier transform runs over a patch's channels. One set of tokens refines the phases, which carry
content, another set the amplitudes, which carry style. The attention of the latter is normalised,
so that style shifts it less. The inverse transform gives the change, which is added as in Rein.
Names and layouts are those of the public code (``JingjunYi/SET``, commit b349b3f).

Three remarks on that code. First, its two-dimensional transform runs over images and channels, so
that an image's result depends on the other images of its batch, and its size on their number. Here
it runs over channels alone, which is the same for a batch of one. Second, the inverse transform
reads the lower D / 2 + 1 frequencies, so that the other outputs of the last layers count as
parameters and have no effect. Third, it has 7,546,881 parameters on a ViT-L, as here, not the
6.94 M of FisherTune's tables.

Shapes: as in :mod:`.rein`.
"""

from math import sqrt

import torch
from detectron2.config import CfgNode
from torch import Tensor
from torch.nn import functional as F

from fishertune_d2.compat import without_autocast

from .registry import TUNING_REGISTRY, linear, uniform
from .rein import Rein, ReinTokens, attend, token_options


class SpectralTokens(ReinTokens):
    """Rein's tokens for the phases, and a second set, of full rank, for the amplitudes.

    The queries come from the first set.

    Args:
        patch_size: side of a patch in pixels.
        options: the other arguments of :class:`.ReinTokens`; each set has ``num_tokens``.
    """

    def __init__(self, *, patch_size: int, **options):
        super().__init__(patch_size=patch_size, **options)
        like = self.learnable_tokens_a
        blocks, num_tokens, width = self.tokens(slice(None)).shape
        bound = sqrt(6 / (3 * patch_size**2 + width))
        self.learnable_tokens2 = uniform((blocks, num_tokens, width), bound, like)
        self.mlp_token2feat2 = linear(width, width, like)
        self.mlp_delta_f2 = linear(width, width, like)

    def change(self, patches: Tensor, block: int) -> Tensor:
        """The change of the patches, computed on phase and amplitude."""
        with without_autocast(patches.device):  # a transform in half precision needs powers of two
            dtype = torch.promote_types(patches.dtype, torch.float32)
            phase, amplitude = decompose(patches.to(dtype))
            first, second = self.tokens(block), self.learnable_tokens2[block]
            scores = F.linear(phase, first)
            phase = attend(phase, scores, first, self.mlp_token2feat, self.mlp_delta_f)
            # The published instance norm treats a patch as a channel: mean and variance run over
            # its scores with all tokens, without learned factors.
            scores = F.layer_norm(F.linear(amplitude, second), second.shape[:1])
            amplitude = attend(amplitude, scores, second, self.mlp_token2feat2, self.mlp_delta_f2)
            return compose(phase, amplitude)


class SpectralRein(Rein):
    """Trains the spectral tokens, in ``backbone.set``; everything else is Rein's."""

    name = "set"
    module = SpectralTokens


def decompose(x: Tensor) -> tuple[Tensor, Tensor]:
    """Phase and amplitude of the spectra along the last dimension, each of the shape of ``x``."""
    spectrum = torch.fft.fft(x)
    real, imaginary = spectrum.real, spectrum.imag
    amplitude = _off_zero(real**2 + imaginary**2).sqrt()
    return torch.atan2(imaginary, _off_zero(real)), amplitude


def compose(phase: Tensor, amplitude: Tensor) -> Tensor:
    """The real signals of the spectra, times the square root of a half, as published."""
    width = phase.shape[-1]
    imaginary = amplitude * phase.sin()
    # The spectrum of a real signal is real at frequencies 0 and D / 2. CPUs ignore an imaginary
    # part there; cuFFT may not.
    imaginary[..., 0] = 0
    if width % 2 == 0:
        imaginary[..., width // 2] = 0
    spectrum = torch.complex(amplitude * phase.cos(), imaginary)
    return torch.fft.irfft(spectrum / sqrt(2 * width), n=width, norm="ortho")


def _off_zero(x: Tensor, least: float = 1e-5) -> Tensor:
    # Near 0 the derivatives of root and angle have no bound.
    return torch.where(x.abs() < least, least, x)


@TUNING_REGISTRY.register()
def set(cfg: CfgNode) -> SpectralRein:
    """``TUNING.METHOD set``: as many tokens of each kind as the head has queries."""
    return SpectralRein(**token_options(cfg))
