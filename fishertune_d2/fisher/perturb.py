"""The simulated unseen domain: randomly shifted feature statistics (Eq. 6, after DSU).

Shapes in this module:
    B images, N patch tokens, P prefix tokens, C channels.
    x: token maps of shape (B, P + N, C), or (B, H, W, C) before they are flattened. Prefix tokens
    (cls, registers) join after the patch embedding. They belong to no place, so they stay
    unchanged. Maps of a convolutional network have the shape (B, C, H, W), and their N tokens are
    its H * W places.
    mu, sigma: (B, 1, C), mean and standard deviation over the N patch tokens.
    spread: (1, 1, C), standard deviation over the B images of mu or of sigma.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

EPS_MODES = ("image", "channel")
_MIN_STD = 1e-6  # keeps (x - mu) / sigma finite on a constant channel; DSU's value, on the variance


@dataclass
class _Shift:
    """The draws of one point for a batch: eps_mu, eps_sigma (B, 1, 1 or C), spreads (1, 1, C)."""

    eps_mu: Tensor
    eps_sigma: Tensor
    spread_mu: Tensor
    spread_sigma: Tensor

    def of_image(self, image: int) -> "_Shift":
        one = slice(image, image + 1)
        return _Shift(self.eps_mu[one], self.eps_sigma[one], self.spread_mu, self.spread_sigma)


class Perturbation(ABC):
    """Makes x' of a batch: by other images, or by hooks in the model's forward pass.

    Attributes:
        draws_in_model: whether a forward pass over a batch draws what its images replay.
    """

    draws_in_model = True

    @abstractmethod
    def notes(self) -> dict[str, str]:
        """How x' is made, for the estimate's notes."""

    def shifted(self, batch: Sequence, images: Sequence[int], seed: int) -> Sequence:
        """The images that the model sees.

        Args:
            batch: the images.
            images: their indices in the whole batch.
            seed: the seed of the whole batch.

        Returns:
            As many images; by default the batch itself.
        """
        return batch

    @abstractmethod
    def drawing(self, generator: torch.Generator | None = None) -> AbstractContextManager[None]:
        """Perturbs forward passes over a batch, or its parts, in a ``with`` block, at random."""

    @abstractmethod
    def replaying(self, image: int) -> AbstractContextManager[None]:
        """Perturbs a forward pass over one image, given by index, as the last batch was."""

    @abstractmethod
    def weights(self, batch: Sequence) -> Tensor:
        """The weight in DRF (Eq. 7) of each image of the last batch, which is given; (B,)."""


class StatisticsPerturbation(Perturbation):
    """Eq. 6 at chosen points of a model, active inside a ``with`` block.

    alpha = mu + eps_mu * Sigma_mu, beta = sigma + eps_sigma * Sigma_sigma, with eps from N(0, 1),
    and x' = beta * (x - mu) / sigma + alpha. Sigma is a statistic of the batch, not of one image.
    So the gradient flows through mu and sigma, but not through Sigma: each image's gradient then
    depends on that image alone. (DSU lets the gradient through Sigma; per-image squares would not
    exist.) With a batch of one, Sigma is 0 and x' = x.

    Args:
        points: modules whose output is a token map to perturb.
        num_prefix_tokens: number of tokens before the patches in a flattened map, one number for
            all points or one for each. A patch embedding's output has none.
        channels_first: whether maps with four dimensions have the shape (B, C, H, W).
        strength: factor on both eps.
        eps_mode: ``"image"``, one pair of numbers per image, shared by channels and points, so
            that the weight exp(-(|eps_mu| + |eps_sigma|)) differs between images. ``"channel"``,
            one pair per image, point and channel, as in DSU; the weight is then nearly constant.
        p: probability that a batch is perturbed.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        points: Sequence[nn.Module],
        *,
        num_prefix_tokens: int | Sequence[int] = 0,
        channels_first: bool = False,
        strength: float = 1.0,
        eps_mode: str = "image",
        p: float = 1.0,
    ):
        if eps_mode not in EPS_MODES:
            raise ValueError(f"unknown eps_mode {eps_mode!r}: choose from {EPS_MODES}")
        if strength < 0:
            raise ValueError(f"strength must not be negative: got {strength}")
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"p must be in [0, 1]: got {p}")
        self.points = list(points)
        if isinstance(num_prefix_tokens, int):
            num_prefix_tokens = [num_prefix_tokens] * len(self.points)
        if len(num_prefix_tokens) != len(self.points):
            raise ValueError(
                f"num_prefix_tokens has {len(num_prefix_tokens)} numbers for {len(self.points)} "
                "points: give one number, or one for each point"
            )
        self.num_prefix_tokens = list(num_prefix_tokens)
        self.channels_first = channels_first
        self.strength = strength
        self.eps_mode = eps_mode
        self.p = p
        self._drawn: list[_Shift] = []

    @classmethod
    def of_vit(
        cls, vit: nn.Module, *, num_prefix_tokens: int | None = None, **options
    ) -> "StatisticsPerturbation":
        """Eq. 6 at the patch embedding and the blocks at 1/3, 1/2 and 2/3 of the depth (ours).

        Args:
            vit: a module with ``patch_embed`` and ``blocks``, such as timm's and Detectron2's
                ViTs, or a model that contains one.
            num_prefix_tokens: number of tokens before the patches in the blocks' outputs; by
                default the ViT's ``num_prefix_tokens``, or 0 if it has no such attribute.
            options: the other arguments of the class.

        Returns:
            The perturbation.

        Raises:
            ValueError: if there is no such module, or several.
        """
        found = [vit] if _is_vit(vit) else [m for m in vit.modules() if _is_vit(m)]
        if len(found) != 1:
            has = f"holds {len(found)} ViTs" if found else "has no patch_embed or no blocks"
            raise ValueError(
                f"{type(vit).__name__} {has}: say where to perturb, "
                "StatisticsPerturbation([modules, ...])"
            )
        vit = found[0]
        if num_prefix_tokens is None:
            # timm's name; Detectron2's ViT has no such tokens.
            num_prefix_tokens = getattr(vit, "num_prefix_tokens", 0)
        blocks = list(vit.get_submodule("blocks").children())
        thirds = [blocks[i] for i in thirds_of_depth(len(blocks))]
        points = [vit.get_submodule("patch_embed"), *thirds]
        # timm flattens the patches in patch_embed, unless dynamic_img_size is set, and adds the
        # prefix tokens after it.
        prefix = [0] + [num_prefix_tokens] * len(thirds)
        return cls(points, num_prefix_tokens=prefix, **options)

    def notes(self) -> dict[str, str]:
        """The strength and how eps is drawn."""
        return {"strength": str(self.strength), "eps_mode": self.eps_mode}

    @contextmanager
    def drawing(self, generator: torch.Generator | None = None) -> Iterator[None]:
        """Perturbs a forward pass over a batch by new draws of a CPU generator; keeps the draws."""
        self._drawn = []
        apply = bool(torch.rand((), generator=generator) < self.p)
        shared: list[Tensor] = []  # eps_mu and eps_sigma

        def draw(tokens: Tensor) -> Tensor:
            mu, sigma = token_statistics(tokens)
            # Several batches, the parts of a larger one, may pass through the points in turn.
            first = len(self._drawn) % len(self.points) == 0
            if self.eps_mode == "channel" or first:
                shape = mu.shape if self.eps_mode == "channel" else (len(mu), 1, 1)
                scale = self.strength if apply else 0.0
                drawn = (torch.randn(shape, generator=generator) for _ in range(2))
                shared[:] = [scale * eps.to(mu) for eps in drawn]
            eps_mu, eps_sigma = shared
            shift = _Shift(eps_mu, eps_sigma, _spread(mu), _spread(sigma))
            self._drawn.append(shift)
            return shift_statistics(tokens, mu, sigma, shift)

        with self._changing([draw] * len(self.points)):
            yield

    @contextmanager
    def replaying(self, image: int) -> Iterator[None]:
        """Perturbs a forward pass over one image, given by index, with its last draws."""
        if len(self._drawn) != len(self.points):
            raise RuntimeError(
                f"nothing to replay: {len(self._drawn)} of {len(self.points)} points were reached "
                "under drawing(); run the model on the whole batch there first"
            )

        def replay(shift: _Shift, tokens: Tensor) -> Tensor:
            return shift_statistics(tokens, *token_statistics(tokens), shift)

        with self._changing([partial(replay, shift.of_image(image)) for shift in self._drawn]):
            yield

    def weights(self, batch: Sequence | None = None) -> Tensor:
        """exp(-(|eps_mu| + |eps_sigma|)) of the last drawn batch (Eq. 7), (B,), in (0, 1]."""
        # With eps_mode "channel" the magnitudes are averaged over points and channels.
        magnitudes = [(s.eps_mu.abs() + s.eps_sigma.abs()).mean(dim=(1, 2)) for s in self._drawn]
        return torch.exp(-torch.stack(magnitudes).mean(dim=0))

    @contextmanager
    def _changing(self, changes: Sequence[Callable[[Tensor], Tensor]]) -> Iterator[None]:
        """Applies a function (B, N, C) -> (B, N, C) to the patch tokens of each point."""

        def hook(
            change: Callable[[Tensor], Tensor],
            prefix: int,
            module: nn.Module,
            inputs: tuple,
            x: Tensor,
        ) -> Tensor:
            if x.dim() == 4 and self.channels_first:
                return change(x.flatten(2).mT).mT.reshape(x.shape)
            if x.dim() == 4:  # a map before the prefix tokens join it
                return change(x.flatten(1, 2)).reshape(x.shape)
            return torch.cat([x[:, :prefix], change(x[:, prefix:])], dim=1)

        handles = [
            point.register_forward_hook(partial(hook, change, prefix))
            for point, change, prefix in zip(
                self.points, changes, self.num_prefix_tokens, strict=True
            )
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


def with_spread(batches: Iterable[Sequence], perturb: Perturbation) -> Iterator[Sequence]:
    """Yields the batches; refuses a first one without the spread that Eq. 6 needs."""
    for step, batch in enumerate(batches):
        # A loader's last one may have a single image left; a shift of images needs no other image.
        if step == 0 and len(batch) < 2 and isinstance(perturb, StatisticsPerturbation):
            raise ValueError(
                "the batches have one image, so Eq. 6 shifts nothing, and F alone would select: "
                "pass batches of two or more, such as DataLoader(..., batch_size=4)"
            )
        yield batch


def thirds_of_depth(depth: int) -> list[int]:
    """Indices of the blocks that end at 1/3, 1/2 and 2/3 of a ViT's depth."""
    return [max(0, end - 1) for end in (depth // 3, depth // 2, 2 * depth // 3)]


def _is_vit(module: nn.Module) -> bool:
    return hasattr(module, "blocks") and hasattr(module, "patch_embed")


def token_statistics(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of (B, N, C) over N, each (B, 1, C); divisor N."""
    mu = tokens.mean(dim=1, keepdim=True)
    sigma = (tokens.var(dim=1, keepdim=True, correction=0) + _MIN_STD).sqrt()
    return mu, sigma


def shift_statistics(tokens: Tensor, mu: Tensor, sigma: Tensor, shift: _Shift) -> Tensor:
    """Eq. 6 on (B, N, C), in a form that returns ``tokens`` to the bit where eps is 0."""
    # beta * (x - mu) / sigma + alpha = x + (x - mu) * eps_sigma * Sigma_sigma / sigma
    # + eps_mu * Sigma_mu. The right side has no rounding where both eps are 0, so that dF is
    # exactly 0 with the shift switched off.
    scale = shift.eps_sigma * shift.spread_sigma / sigma
    return tokens + (tokens - mu) * scale + shift.eps_mu * shift.spread_mu


def _spread(statistic: Tensor) -> Tensor:
    """Standard deviation over the batch, (1, 1, C); divisor B, so a batch of one gives 0."""
    return statistic.detach().std(dim=0, keepdim=True, correction=0)
