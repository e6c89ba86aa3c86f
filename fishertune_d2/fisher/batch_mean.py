"""Squares of batch-mean gradients, as ChildTuning-D takes them (Xu et al., EMNLP 2021).

For each weight n, over the batches b of all processes:

    F_n = mean_b (d mean_{i in b} L_i / d theta_n)^2

**Reduction**: the square is taken after the mean over a batch's images, so this is not Eq. 9, where
it is taken before. Where images' gradients have mean m and variance v, a batch of B gives
m^2 + v / B, and Eq. 9 gives m^2 + v: what images disagree about counts less, the more of them are
in a batch. It is here to be compared with.
"""

from .activations import gradients_of
from .batch_losses import BatchLosses
from .cost import Cost
from .diagonal import DiagonalLoop


class BatchMean(DiagonalLoop):
    """One backward pass through the mean loss of each batch; any model, any loss.

    Unlike the authors', it does not clip gradients first: they clip each parameter's by itself,
    which makes F of different layers incomparable.
    """

    cost = Cost()

    def update(self, losses: BatchLosses) -> None:
        """Adds the squares of a batch's mean gradients.

        Raises:
            FloatingPointError: if a gradient is not finite, with the parameter's name and the
                batch's first image.
        """
        self.images += 1  # the batch counts as one
        gradients = gradients_of(losses.together().mean(), self.parameters)
        self._add(gradients, losses.place(0))
