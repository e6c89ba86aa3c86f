"""The negative log-likelihood of a distribution over classes, as a loss for the estimate.

Shapes: B images, C classes, any further positions (...), such as pixels; logits (B, C, ...).
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .batch_losses import image_seeds


class SoftmaxLikelihood:
    """A ``loss_fn`` for models with class logits, on given labels or on labels drawn from them.

    Args:
        logits: ``(model, batch) -> (B, C, ...)``.
        labels: ``batch -> (B, ...)``, int64; -100 where there is none. Not needed to draw labels.
    """

    def __init__(
        self,
        logits: Callable[[nn.Module, Sequence], Tensor],
        labels: Callable[[Sequence], Tensor] | None = None,
    ):
        self.logits = logits
        self.labels = labels

    def __call__(self, model: nn.Module, batch: Sequence) -> Tensor:
        """Cross entropy with the labels in the batch, mean over the labelled positions, (B,)."""
        if self.labels is None:
            raise ValueError("SoftmaxLikelihood was built without labels: use labels='sampled'")
        logits = self.logits(model, batch)
        labels = self.labels(batch).to(logits.device)
        losses = F.cross_entropy(logits, labels, reduction="none").view(len(labels), -1)
        labelled = (labels != -100).view(len(labels), -1)
        return losses.sum(1) / labelled.sum(1).clamp_min(1)

    def sampled(self, model: nn.Module, batch: Sequence) -> Tensor:
        """Cross entropy with labels drawn from the model, mean over all positions, (B,)."""
        log_probabilities = self.logits(model, batch).log_softmax(1)
        return sampled_nll(log_probabilities, image_seeds(len(batch)))


def sampled_nll(log_probabilities: Tensor, seeds: Sequence[int]) -> Tensor:
    """Draws a label at each position and returns its negative log-likelihood (Eq. 4's y).

    The draw inverts the distribution function, so that a small change of the distribution changes
    few labels: x and x' are compared on nearly the same labels.

    Args:
        log_probabilities: (B, C, ...), normalised over C.
        seeds: one for each image.

    Returns:
        (B,), mean over positions. No gradient flows through the draw.
    """
    positions = log_probabilities.shape[2:]
    uniform = torch.stack(
        [torch.rand(positions, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    ).to(log_probabilities.device)
    with torch.no_grad():
        cumulative = log_probabilities.exp().cumsum(1)
        # The sum may fall short of 1 by a rounding.
        labels = (cumulative < uniform[:, None] * cumulative[:, -1:]).sum(1)
    chosen = log_probabilities.gather(1, labels[:, None])
    return -chosen.reshape(len(chosen), -1).mean(1)
