"""Lambda by the reparametrisation trick alone (Eq. 10 to 13), without Eq. 12's F for the curvature.

The derivative of a reparametrised draw's loss with respect to Lambda^-1 estimates half the diagonal
of the loss's own second derivatives. These agree with squares of gradients only if labels are drawn
from the model and the loss is a log-likelihood. For other losses they can even be negative, where
Lambda falls to the prior's and F is 0. This estimator exists for comparisons.

Draws are independent for each token, where one draw of the weights would be shared by the whole
image. So the variance is far smaller, and the limit ignores how an image's tokens act together.
"""

import torch

from ..batch_losses import BatchLosses
from .diagonal import require_all_caught
from .estimator import Cost
from .linear_calls import LinearCalls
from .variational import Variational


class Pathwise(Variational):
    """:class:`Variational` with derivatives of the drawn losses: two passes for each step.

    Its start, its step size and its arguments are the same.
    """

    # The variances and their gradient, once of the pass before and once of both.
    cost = Cost(extra=2, passes=2)

    def _add_curvature(self, losses: BatchLosses) -> None:
        variances = self._variances()
        names, learned = zip(*variances.items(), strict=True)
        for each in learned:
            each.requires_grad_(True)
        # Antithetic pairs: the loss's slope along the noise is far larger than its curvature, but
        # has the opposite sign in the second pass and cancels.
        for sign in (1.0, -1.0):
            run = self._drawing(variances, sign, losses)
            with torch.enable_grad(), LinearCalls(self.parameters, run) as calls:
                values = losses.together()
            require_all_caught(values, self.parameters, calls.seen)
            gradients = torch.autograd.grad(
                values.sum(), learned, allow_unused=True, materialize_grads=True
            )
            for name, gradient in zip(names, gradients, strict=True):
                if not gradient.isfinite().all():
                    raise FloatingPointError(
                        f"the gradient of Lambda of {name} is not finite on {losses.place(0)}"
                    )
                for rows in self.rows[name]:  # twice the mean of both signs is their sum
                    self.sums[name][rows] += gradient[rows]
