"""Squares of batch-mean gradients, as ChildTuning-D takes them (Xu et al., EMNLP 2021).

For each weight n, over the batches b of all processes:

    F_n = mean_b (d mean_{i in b} L_i / d theta_n)^2

**Reduction**: the square is taken after the mean over a batch's images. Eq. 9 takes it before. If
the gradients of the images have mean m and variance v, a batch of B gives m^2 + v / B, and Eq. 9
gives m^2 + v: the larger the batch, the less the disagreement between images counts. This estimator
exists for comparisons.
"""

from ..activations import gradients_of
from ..batch_losses import BatchLosses
from .diagonal import DiagonalLoop
from .estimator import Cost


class BatchMean(DiagonalLoop):
    """One backward pass through the mean loss of each batch, for any model and any loss.

    Gradients are not clipped first. The authors clip each parameter's gradient by itself, which
    makes F of different layers incomparable.
    """

    cost = Cost()

    def update(self, losses: BatchLosses) -> None:
        """Adds the squares of a batch's mean gradients.

        A gradient that is not finite raises a FloatingPointError, which names the parameter and the
        first image of the batch.
        """
        self.images += 1  # the batch counts as one
        gradients = gradients_of(losses.together().mean(), self.parameters)
        self._add(gradients, losses.place(0))
