"""The diagonal Fisher information (Eq. 8, 9): squares of per-image gradients, two ways.

For each weight n, over the images i of all processes:

    F_n = mean_i (d L_i / d theta_n)^2

**Reduction**: L_i is the loss of one image, with any reduction over its own pixels; the square is
taken per image; the mean runs over images. The square of a batch-mean gradient is a different and
smaller number. Scaling every loss by c scales F by c^2. This changes no ranking, except through
``eps`` of Eq. 5, which is compared with F.

Shapes: B images, T tokens of an image; x (B, T, in), g (B, T, out), weight (out, in).
"""

from collections.abc import Callable, Mapping, Sequence, Set
from functools import partial

import torch
from torch import Tensor, nn

from ..activations import gradients_of
from ..batch_losses import BatchLosses
from .estimator import Cost, Estimator, mean_over_images, zeros_like_parameters
from .linear_calls import LinearCall, LinearCalls

# Memory in bytes for the per-image products of :class:`Diagonal`, beside that of a backward pass;
# more only if one matrix is larger.
CHUNK_BYTES = 64 * 2**20


class DiagonalLoop(Estimator):
    """The reference: one forward and one backward pass for each image.

    Works for any loss and any model. Memory: the gradients of one image and one number per weight.
    """

    # The gradients of the image before; Eq. 6 takes statistics over the whole batch.
    cost = Cost(extra=1, images=1, draws=1)

    def reset(self) -> None:
        """Sets the sums of squares to 0."""
        self.images = 0
        self.sums = zeros_like_parameters(self.parameters)

    def update(self, losses: BatchLosses) -> None:
        """Adds the squares of a batch.

        A gradient that is not finite raises a FloatingPointError, which names the parameter and the
        image.
        """
        self.images += losses.size
        for image in range(losses.size):
            gradients = gradients_of(losses.alone(image), self.parameters)
            self._add(gradients, losses.place(image))

    def _add(self, gradients: Sequence[Tensor | None], place: str) -> None:
        """Adds the squares of one gradient for each parameter."""
        for name, gradient in zip(self.parameters, gradients, strict=True):
            if gradient is None:  # the loss does not depend on this parameter
                continue
            if not gradient.isfinite().all():
                raise FloatingPointError(f"the gradient of {name} is not finite on {place}")
            for rows in self.rows[name]:
                part = gradient[rows].to(self.sums[name].dtype)
                self.sums[name][rows].addcmul_(part, part)

    def fisher(self) -> dict[str, Tensor]:
        """F by parameter name; sums over processes, so every process must call it."""
        return mean_over_images(self.sums, self.images)


class Diagonal(DiagonalLoop):
    """The same squares from one forward and one backward pass for each batch.

    The gradient of image i in a linear layer is g_i^T x_i, with x the layer's input and g the
    gradient of its output. One pass over the batch catches both. It costs the multiplications of
    the loop, without its many small passes. Extra memory: the inputs of the candidate layers, which
    a backward pass keeps anyway, and :data:`CHUNK_BYTES`.

    Needs a ``loss_fn`` that passes the whole batch through the model at once, and a model in which
    images do not mix (no batch statistics) and one linear layer uses each candidate once.
    """

    cost = Cost()

    def update(self, losses: BatchLosses) -> None:
        """Adds the squares of a batch.

        A model that does not fit raises a ValueError, which says which estimator to use. A gradient
        that is not finite raises a FloatingPointError, which names the parameter and the image.
        """
        self.images += losses.size
        add_squares(self, self.sums, losses)


def add_squares(
    estimator: Estimator,
    sums: Mapping[str, Tensor],
    losses: BatchLosses,
    linear: Callable[[LinearCall], Tensor] = LinearCall.output,
) -> Tensor:
    """Adds each image's squared gradients to ``sums`` in one pass; returns the losses, (B,)."""
    parameters = estimator.parameters
    # The backward pass differentiates with respect to this scalar alone. So it computes no gradient
    # of a weight, and reaches every layer, whichever weights require a gradient.
    anchor = torch.zeros((), device=estimator.device, requires_grad=True)
    finite: list[tuple[LinearCall, Tensor]] = []

    def catch(call: LinearCall, x: Tensor, g: Tensor) -> None:
        x, g = (_by_image(tensor, losses.size, call) for tensor in (x.to(g.dtype), g))
        finite.append((call, g.isfinite().flatten(1).all(1)))
        _add_products(sums, estimator.rows, call, x, g)

    def run(call: LinearCall) -> Tensor:
        return _Caught.apply(linear(call), anchor, call.x.detach(), partial(catch, call))

    with torch.enable_grad(), LinearCalls(parameters, run) as calls:
        values = losses.together()
    require_all_caught(values, parameters, calls.seen)
    if calls.seen:
        torch.autograd.grad(values.sum(), anchor, allow_unused=True)
    _require_finite(finite, losses)
    return values.detach()


class _Caught(torch.autograd.Function):
    """The identity on y; its backward pass gives x and the gradient of y to a function."""

    @staticmethod
    def forward(ctx, y: Tensor, anchor: Tensor, x: Tensor, catch: Callable) -> Tensor:
        # An attribute, not save_for_backward: an activation checkpoint counts saved tensors.
        ctx.x, ctx.catch = x, catch
        ctx.mark_dirty(y)
        return y

    @staticmethod
    def backward(ctx, g: Tensor):
        ctx.catch(ctx.x, g)
        ctx.x = ctx.catch = None  # frees the input as soon as a backward pass would
        return g, g.new_zeros(()), None, None


def _by_image(tensor: Tensor, images: int, call: LinearCall) -> Tensor:
    # Window attention folds windows into the first dimension, one image after the other.
    if tensor.shape[0] % images:
        raise ValueError(
            f"{call.names[0]} sees {tuple(tensor.shape)} in a batch of {images} images, which does "
            "not split by image: use the estimator 'diagonal_loop'"
        )
    return tensor.reshape(images, -1, tensor.shape[-1])


def _add_products(
    sums: Mapping[str, Tensor],
    rows: Mapping[str, Sequence[slice]],
    call: LinearCall,
    x: Tensor,
    g: Tensor,
) -> None:
    if call.weight_name is not None:
        for part in rows[call.weight_name]:
            total = sums[call.weight_name][part]
            chunk = max(1, CHUNK_BYTES // (total.numel() * total.element_size()))
            for start in range(0, len(x), chunk):
                some = slice(start, start + chunk)
                products = torch.bmm(g[some, :, part].mT, x[some]).to(total.dtype)
                total.add_(products.square_().sum(0))  # Eq. 9, squares per image
    for name, outputs in call.bias_names:
        for part in rows[name]:
            products = g[:, :, outputs][:, :, part].sum(1).to(sums[name].dtype)
            sums[name][part].add_(products.square_().sum(0))


def require_all_caught(
    losses: Tensor, parameters: Mapping[str, nn.Parameter], seen: Set[str]
) -> None:
    """Refuses parameters that reach the losses in another way than by a layer in ``seen``."""
    missed = {name: p for name, p in parameters.items() if name not in seen}
    if not missed or not losses.requires_grad:
        return
    gradients = torch.autograd.grad(
        losses.sum(), list(missed.values()), retain_graph=True, allow_unused=True
    )
    for name, gradient in zip(missed, gradients, strict=True):
        if gradient is not None:
            raise ValueError(
                f"{name} has another use than as the weight or bias of a linear layer: use the "
                "estimator 'diagonal_loop'"
            )


def _require_finite(finite: Sequence[tuple[LinearCall, Tensor]], losses: BatchLosses) -> None:
    # One stack, so that the host waits for the device once.
    if not finite or torch.stack([each for _, each in finite]).all():
        return
    call, each = next((call, each) for call, each in finite if not each.all())
    image = int((~each).nonzero()[0])
    raise FloatingPointError(
        f"the gradient of {call.names[0]} is not finite on {losses.place(image)}"
    )
